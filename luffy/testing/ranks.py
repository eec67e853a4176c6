"""Run a function on several real ranks: forked processes that talk over gloo, or over NCCL with a GPU each.

Forking keeps the start cheap (torch is loaded once), so a test can afford real processes; a test does well to assert
much in one launch. Where a launch is dear, as with a GPU a rank, `run_together` (together.py) shares one among tests.
"""

from __future__ import annotations

import gc
import multiprocessing as mp
import os
import queue
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist


class RankFailedError(AssertionError):
    """A rank raised: carries its number and its traceback."""


def join(rank: int, world: int, store: str, backend: str) -> None:
    """Make this process rank `rank` of `world`, which meet at the file `store`."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank)}
    os.environ |= {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, device_id=device)


def context_for(backend: str) -> Any:
    """How ranks are started: forked over gloo; over NCCL forked from a server that has touched no GPU."""
    if backend == "gloo":
        return mp.get_context("fork")
    mp.set_forkserver_preload(["luffy.train.trainer"])
    return mp.get_context("forkserver")


def start_all(children: Sequence[Any]) -> None:
    """Start processes. What the parent no longer uses must not be destroyed in a child: a destructor that joins a
    thread (a store's daemon, say) would wait for ever, since a fork takes no threads along."""
    gc.collect()
    gc.freeze()
    for child in children:
        child.start()
    gc.unfreeze()


def _child(fn: Callable[..., Any], rank: int, world: int, store: str, args: tuple, results: Any, backend: str) -> None:
    try:
        join(rank, world, store, backend)
        value = fn(rank, *args)
        dist.barrier()
        results.put((rank, True, value))
    except BaseException:
        results.put((rank, False, traceback.format_exc()))
    finally:
        results.close()
        results.join_thread()
        # Skip the interpreter's shutdown: a forked child must not run its parent's exit handlers.
        os._exit(0)


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` ranks; the results (picklable, no live tensors) in rank order.

    backend: "gloo", or "nccl", where rank r has GPU r. Those ranks are forked from a server that has touched no GPU
    (the oracle's optimizer here does), so `fn` must be importable by its name.
    Raises `RankFailedError` with the traceback of the first rank that failed, or that one did not answer in time.
    """
    context = context_for(backend)
    results = context.Queue()
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        children = [
            context.Process(target=_child, args=(fn, r, world_size, store, args, results, backend), daemon=True)
            for r in range(world_size)
        ]
        start_all(children)
        answers: dict[int, Any] = {}
        deadline = time.monotonic() + timeout_seconds
        try:
            while len(answers) < world_size:
                try:
                    rank, ok, value = results.get(timeout=0.5)
                except queue.Empty:
                    dead = [r for r, c in enumerate(children) if not c.is_alive() and r not in answers]
                    if dead and results.empty():
                        raise RankFailedError(f"rank {dead[0]} died without a word") from None
                    if time.monotonic() > deadline:
                        missing = [r for r in range(world_size) if r not in answers]
                        raise RankFailedError(f"no answer from ranks {missing}") from None
                    continue
                if not ok:
                    # A rank that was lost says nothing, but its peers complain of it: look for it first.
                    time.sleep(0.5)
                    silent = [r for r, c in enumerate(children) if c.exitcode not in (None, 0)]
                    if silent:
                        raise RankFailedError(f"rank {silent[0]} died without a word; rank {rank} then:\n{value}")
                    raise RankFailedError(f"rank {rank} failed:\n{value}")
                answers[rank] = value
        finally:
            for child in children:
                if len(answers) < world_size:
                    child.kill()
                child.join()
    return [answers[r] for r in range(world_size)]
