"""Launch: join the world that torchrun describes, or start local ranks.

A user's mistake on any rank ends the job with one line and status 2; a rank that dies or falls silent takes the others
down within seconds, and one line names it, whichever of them noticed first. Local ranks meet on the loopback alone:
nothing that they or their launcher open listens on another interface (luffy.train.scratch, `join_world`).
"""

from __future__ import annotations

import os
import time
import traceback
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist

from luffy.comm import Mesh, build_mesh, init_distributed
from luffy.comm.alike import check_alike, code_facts
from luffy.errors import StoppedError, UserError
from luffy.lab.namespace import die_with_parent
from luffy.lab.place import current_lab, end_with, take_place
from luffy.train import lastwords, stopping
from luffy.train.scratch import get_scratch, loopback_name, open_store
from luffy.train.supervise import Attempt, RanksLostError, Requests

# What a collective says when the fault is another rank's.
LOST_PEER = ("Connection reset", "Connection closed", "Broken pipe", "closed by peer", "Connection refused")
LOST_PEER_SECONDS = 2.0
# A rank that waits reports who is late after --timeout-seconds; the backend's own timeout is for ranks that cannot.
MORE_SECONDS = 30.0
_WHOLE_NUMBERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_PORT")


def under_torchrun() -> bool:
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def check_environment() -> None:
    """UserError where torchrun's variables are incomplete or no numbers."""
    for name in ("MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(
                f"RANK and WORLD_SIZE are set, and {name} is not: start under torchrun, or unset them and use --ranks"
            )
    for name in _WHOLE_NUMBERS:
        if not (text := os.environ.get(name, "0")).isdigit():
            raise UserError(
                f"{name}={text} in the environment is not a whole number; unset it, or start under torchrun"
            )
    if int(os.environ["RANK"]) >= int(os.environ["WORLD_SIZE"]):
        raise UserError(f"RANK={os.environ['RANK']} must be less than WORLD_SIZE={os.environ['WORLD_SIZE']}")


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


def choose_interface(interface: str | None) -> None:
    """Have gloo and NCCL listen on one interface: the one that is named, else the loopback if all ranks are here.

    What the environment says already stays as it is. Between machines, with nothing named, they choose by themselves.
    """
    here = os.environ.get("LOCAL_WORLD_SIZE") == os.environ.get("WORLD_SIZE")
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        if interface is not None:
            os.environ[name] = interface
        elif here:
            os.environ.setdefault(name, loopback_name())


def join_world(
    device: str = "auto",
    backend: str = "auto",
    ep_size: int | None = None,
    ranks_per_node: int | None = None,
    timeout_seconds: float = 600.0,
    interface: str | None = None,
) -> Mesh:
    """Initialise this rank from torchrun's environment, unless it is in a process group already; arrange the mesh."""
    joined = dist.is_initialized()
    if not joined:
        check_environment()
    local_rank = int(os.environ.get("LOCAL_RANK", dist.get_rank() if joined else 0))
    local_ranks = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size() if joined else 1))
    lab = current_lab()
    if lab is not None:  # its nodes are one machine, so all of its ranks share these GPUs and cores
        local_rank, local_ranks = int(os.environ["RANK"]), lab.ranks
    elif not joined:
        choose_interface(interface)
    device, backend = choose_device(device, backend, local_ranks)
    if device == "cuda":
        where = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)
    else:
        where = torch.device("cpu")
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_ranks))
    init_distributed(backend, where, timeout_seconds + MORE_SECONDS)
    check_alike(code_facts() | {"--ep-size": ep_size, "--ranks-per-node": ranks_per_node}, where)
    return build_mesh(where, ep_size, ranks_per_node)


def run_rank(work: Callable[..., Any], args: tuple[Any, ...], folder: str | None = None, launcher: int = 0) -> None:
    """Run `work(*args)` as one rank. `folder` is where its launcher, process `launcher`, looks for its last words.

    A UserError leaves its line there, or is printed where torchrun is the launcher, and the rank exits with status 2.
    Under `luffy lab` the rank first moves behind its shaped link. It ends with its launcher, whatever ends that one.
    """
    rank = os.environ.get("RANK", "0")
    lastwords.begin(folder)
    try:
        if folder:
            end_with(launcher)
            take_place(int(rank))
        elif "TORCHELASTIC_RUN_ID" in os.environ:
            die_with_parent(os.getppid())
        stopping.install()
        work(*args)
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    except UserError as error:
        to_say = f"error: {error}" if rank == "0" or dist.is_initialized() else None
        lastwords.leave_word("user", str(error), to_say)
        lastwords.end_process(2)
    except StoppedError as error:
        lastwords.leave_word("stopped", str(error), str(error) if rank == "0" else None)
        lastwords.end_process(error.status)
    except BaseException as error:
        text, line = traceback.format_exc(), None
        if any(words in text for words in LOST_PEER):
            time.sleep(LOST_PEER_SECONDS)  # let the launcher notice the rank that was lost before this one
            line = f"error: rank {rank} lost its connection to another rank, which ended ({last_line(error)})"
        lastwords.leave_word("crash", text, line)
        if folder or line:
            lastwords.end_process(1)
        raise


def last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__


def launch(
    work: Callable[..., Any],
    args: tuple[Any, ...],
    ranks: int,
    again: Callable[[int, int, str], tuple[tuple[Any, ...], int] | None] | None = None,
) -> None:
    """Start `ranks` local ranks, each running `work(*args)`; or run it here when torchrun already started us.

    again: asked when ranks were lost, with the number of the attempt, its ranks and what happened; the arguments and
    the number of ranks of the next attempt, or None to give up.
    Raises UserError with the line of the first rank that had one, StoppedError where a signal asked for it, otherwise
    RuntimeError with one line, or with the traceback of a defect.
    """
    if under_torchrun():
        check_environment()
        run_rank(work, args)
        return
    requests, attempt = Requests(), 0
    scratch = get_scratch()
    with requests.listening():
        while True:
            store, port = open_store()  # of this attempt: what ranks of an earlier one left in it would mislead
            try:
                Attempt(run_rank, work, args, ranks, attempt, scratch, port, requests).run()
                break
            except RanksLostError as error:
                following = None if again is None or requests.number is not None else again(attempt, ranks, str(error))
                if following is None:
                    raise
                (args, ranks), attempt = following, attempt + 1
        del store
