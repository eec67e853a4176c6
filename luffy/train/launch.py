"""Launch: join the world that torchrun describes, or start local ranks through torch's own launcher.

A user's mistake on any rank ends the job with one line and status 2; a rank that dies takes the others down within
seconds, and the cause is printed, whichever of them noticed first.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from luffy.comm import Mesh, build_mesh, init_distributed
from luffy.comm.alike import check_alike, code_facts
from luffy.errors import UserError
from luffy.lab.place import current_lab, take_place

# What a collective says when the fault is another rank's.
_LOST_PEER = ("Connection reset", "Connection closed", "Broken pipe", "closed by peer", "Connection refused")


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def choose_device(device: str, backend: str, local_ranks: int) -> tuple[str, str]:
    """("cpu" or "cuda", "gloo" or "nccl") for `local_ranks` ranks on this machine.

    Raises UserError when a GPU is asked for that is not there, or NCCL for more ranks than GPUs (NCCL refuses two
    ranks on one device; gloo does not).
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    gpus = torch.cuda.device_count() if device == "cuda" else 0
    if backend == "nccl":
        if device == "cpu":
            raise UserError("--backend nccl needs --device cuda; use --backend gloo on the CPU")
        if local_ranks > gpus:
            raise UserError(
                f"--backend nccl: {local_ranks} ranks but {gpus} GPUs; use --ranks {gpus}, or --backend gloo to "
                "share a GPU"
            )
    if backend == "auto":
        backend = "nccl" if device == "cuda" and local_ranks <= gpus else "gloo"
    return device, backend


def join_world(
    device: str = "auto",
    backend: str = "auto",
    ep_size: int | None = None,
    ranks_per_node: int | None = None,
    timeout_seconds: float = 600.0,
) -> Mesh:
    """Initialise this rank from torchrun's environment and arrange the mesh."""
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    lab = current_lab()
    if lab is not None:  # its nodes are one machine, so all of its ranks share these GPUs and cores
        local_rank, local_ranks = int(os.environ["RANK"]), lab.ranks
    device, backend = choose_device(device, backend, local_ranks)
    if device == "cuda":
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    else:
        where = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    init_distributed(backend, where, timeout_seconds)
    check_alike(code_facts() | {"--ep-size": ep_size, "--ranks-per-node": ranks_per_node}, where)
    return build_mesh(where, ep_size, ranks_per_node)


def run_rank(work: Callable[..., Any], args: tuple[Any, ...], folder: str | None = None) -> None:
    """Run `work(*args)` as one rank. `folder` is where its launcher looks for the words of a failure.

    A UserError leaves its line there, or is printed where torchrun is the launcher, and the rank exits with status 2.
    Under `luffy lab` the rank first moves behind its shaped link.
    """
    try:
        if folder:
            take_place(int(os.environ["RANK"]))
        work(*args)
    except UserError as error:
        rank = os.environ.get("RANK", "0")
        if folder:
            Path(folder, f"user-{rank}").write_text(str(error), encoding="utf-8")
        elif rank == "0" or dist.is_initialized():
            print(f"luffy: error: {error}", file=sys.stderr, flush=True)
        _leave(2)
    except BaseException:
        if folder:
            text, rank = traceback.format_exc(), os.environ.get("RANK", "0")
            Path(folder, f"crash-{rank}").write_text(text, encoding="utf-8")
            if any(words in text for words in _LOST_PEER):
                time.sleep(2)  # let the launcher notice the rank that was lost before this one, which only misses it
            _leave(1)
        raise
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def _leave(status: int) -> None:
    """End this rank at once: waiting for peers that are stuck in a collective would be the hang itself."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def launch(work: Callable[..., Any], args: tuple[Any, ...], ranks: int) -> None:
    """Start `ranks` local ranks, each running `work(*args)`; or run it here when torchrun already started us.

    Raises UserError with the line of the first rank that had one, RuntimeError with the first traceback otherwise.
    """
    if under_torchrun():
        run_rank(work, args)
        return
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    with tempfile.TemporaryDirectory(prefix="luffy-") as folder:
        multiprocessing.set_forkserver_preload(["luffy.train.trainer"])
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=ranks,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            run_id=f"luffy-{os.getpid()}",
            max_restarts=0,
            monitor_interval=0.1,
            # Ranks are forked from a fresh server that has imported torch once and has neither threads nor a GPU: quick
            # as a fork, and as safe as a spawn. (A fork of this process inherits stores whose threads it lacks.)
            start_method="forkserver",
        )
        try:
            elastic_launch(config, run_rank)(work, args, folder)
        except ChildFailedError as error:
            _explain(Path(folder), error)
        except SignalException as error:  # SIGTERM, say of a batch system; the ranks have been stopped
            raise KeyboardInterrupt from error


def _explain(folder: Path, error: ChildFailedError) -> None:
    """Raise what a person should read about a failed job."""
    user = sorted(folder.glob("user-*"), key=lambda p: p.stat().st_mtime_ns)
    if user:
        raise UserError(user[0].read_text(encoding="utf-8")) from None
    crashes = sorted(folder.glob("crash-*"), key=lambda p: p.stat().st_mtime_ns)
    reported = {int(p.name.split("-")[1]) for p in crashes}
    # A rank that was killed says nothing itself; SIGTERM is how the launcher stops the others.
    for rank, failure in error.failures.items():
        if rank not in reported and failure.exitcode < 0 and failure.exitcode != -signal.SIGTERM:
            raise RuntimeError(f"rank {rank} was ended by signal {-failure.exitcode}; the other ranks were stopped")
    if crashes:
        text = crashes[0].read_text(encoding="utf-8")
        raise RuntimeError(f"rank {crashes[0].name.split('-')[1]} failed:\n{text}")
    raise RuntimeError(f"the ranks failed: {error}")
