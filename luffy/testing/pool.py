"""Ranks that wait for work: processes in a process group, kept from one call to the next.

Ranks over gloo are forked (torch is loaded once, and no test pays for its start or for first calls into torch again)
and kept for as long as the parent lives. Each call finds what a fork would have found: environment, folder and seeds
are the parent's or set anew, and where the parent's code is not what it was at the fork (a test patched luffy, its own
modules or a few of torch's), or a call left a patch behind in a rank, the ranks are replaced. Ranks over NCCL are
forked from a server that has touched no GPU, and end with the call.
"""

from __future__ import annotations

import atexit
import contextlib
import gc
import multiprocessing as mp
import os
import pickle
import random
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from luffy.testing.patches import CodeState

_JOBS_A_GROUP = 16  # a job makes process groups of its own, which keep threads and sockets until the world's is renewed


def join(rank: int, world: int, store: str, backend: str) -> None:
    """Make this process rank `rank` of `world`, which meet at the file `store`."""
    device = None
    if backend == "nccl":
        device = torch.device("cuda", rank)
        torch.cuda.set_device(device)
    dist.init_process_group(backend, init_method=f"file://{store}", rank=rank, world_size=world, device_id=device)


def _settle(rank: int, world: int, folder: str, environ: Mapping[str, str]) -> None:
    """The surroundings of a job: the parent's folder and environment, which also says who this rank is; seeds."""
    os.chdir(folder)
    own = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world)}
    if dict(os.environ) != (wanted := {**environ, **own}):
        os.environ.clear()
        os.environ.update(wanted)
    torch.set_num_threads(1)
    torch.set_default_dtype(torch.float32)
    torch.manual_seed(0)
    np.random.seed(0)
    random.seed(0)


def _serve(rank: int, world: int, backend: str, pipe: Connection) -> None:
    """A rank: jobs in turn, an answer after each: (whether it went well, value or traceback, whether to end it).

    (None, traceback, True) says that there was no world to run the job in.
    """
    gc.freeze()
    sys.stdout = os.fdopen(os.dup(1), "w", buffering=1)  # else it were a copy of the capture of a test long over
    code, parent = CodeState(), os.getppid()
    try:
        while True:
            while not pipe.poll(5.0):
                if os.getppid() != parent:
                    os._exit(0)
            store, folder, environ, work = pickle.loads(pipe.recv_bytes())
            well, value = None, None
            try:
                _settle(rank, world, folder, environ)
                if store is not None:
                    if dist.is_initialized():
                        dist.destroy_process_group()
                    join(rank, world, store, backend)
                well = False
                fn, args = pickle.loads(work)
                value = fn(rank, *args)
                if torch.cuda.is_initialized():
                    torch.cuda.synchronize()  # what is still under way belongs to this job, its failures too
                sys.stdout.flush()
                answer = pickle.dumps((True, value, not dist.is_initialized() or code.is_patched()))
            except BaseException:
                answer = pickle.dumps((well, traceback.format_exc(), well is None))
            pipe.send_bytes(answer)
            del value, answer
            gc.collect()
    finally:
        # Skip the interpreter's shutdown: a forked child must not run its parent's exit handlers.
        os._exit(0)


class Ranks:
    """`world_size` processes; `run` has them do something, `end` ends them."""

    def __init__(self, world_size: int, backend: str) -> None:
        if backend == "nccl":
            mp.set_forkserver_preload(["luffy.train.trainer"])
        context: Any = mp.get_context("forkserver" if backend == "nccl" else "fork")
        self.world_size, self.backend = world_size, backend
        self.spent = False  # they cannot serve another job
        self._output = _output()
        self._folder = tempfile.TemporaryDirectory()
        self._jobs = self._stores = 0
        pairs = [context.Pipe() for _ in range(world_size)]
        self._pipes = [ours for ours, _ in pairs]
        self._children = [
            context.Process(target=_serve, args=(r, world_size, backend, pairs[r][1]), daemon=True)
            for r in range(world_size)
        ]
        self._code = CodeState()
        # What the parent no longer uses must not be destroyed in a child: a destructor that joins a thread (a store's
        # daemon, say) would wait for ever, since a fork takes no threads along.
        gc.freeze()
        for child in self._children:
            child.start()
        gc.unfreeze()
        for _, theirs in pairs:
            theirs.close()

    def as_forked_now(self) -> bool:
        """Whether ranks forked now would run the same code and write to the same places."""
        return self._output == _output() and not self._code.is_patched() and not self._code.is_extended()

    def run(
        self, fn: Callable[..., Any], args: Sequence[Any], seconds: float, grace_seconds: float
    ) -> tuple[dict[int, tuple[bool | None, Any]], list[str]]:
        """Call `fn(rank, *args)` on each: answers by rank in the order in which they came, and what became of others.

        An answer: (True, value), (False, traceback), or (None, traceback) where no process group came about. Ranks
        have `seconds` in all, and `grace_seconds` after the first failure.
        """
        store = None
        if self._jobs % _JOBS_A_GROUP == 0:
            self._stores += 1
            store = os.path.join(self._folder.name, f"store-{self._stores}")
        self._jobs += 1
        job = pickle.dumps((store, os.getcwd(), dict(os.environ), pickle.dumps((fn, args))))
        for pipe in self._pipes:
            with contextlib.suppress(OSError):  # a rank that has died since is found below
                pipe.send_bytes(job)
        answers, lost = self._gather(time.monotonic() + seconds, grace_seconds)
        self.spent = self.spent or bool(lost)
        if not all(well for well, _ in answers.values()):
            self._jobs = 0  # a collective may have been entered by some only
        return answers, lost

    def _gather(self, deadline: float, grace_seconds: float) -> tuple[dict[int, tuple[bool | None, Any]], list[str]]:
        answers: dict[int, tuple[bool | None, Any]] = {}
        while waiting := [r for r in range(len(self._pipes)) if r not in answers]:
            ready = wait([self._pipes[r] for r in waiting] + [self._children[r].sentinel for r in waiting], 0.5)
            for r in waiting:
                if self._pipes[r] in ready:
                    with contextlib.suppress(EOFError, OSError):
                        well, value, spent = pickle.loads(self._pipes[r].recv_bytes())
                        answers[r] = well, value
                        self.spent = self.spent or spent
                        if not well:
                            deadline = min(deadline, time.monotonic() + grace_seconds)
            for r in waiting:
                if r not in answers and not self._children[r].is_alive():
                    return answers, [f"rank {r} died without a word"]
            if time.monotonic() > deadline and len(answers) < len(self._pipes):
                return answers, [f"no answer from ranks {[r for r in waiting if r not in answers]}"]
        return answers, []

    def end(self) -> None:
        """Kill them. A second time does nothing."""
        self.spent = True
        for child in self._children:
            child.kill()
            child.join()
        for pipe in self._pipes:
            pipe.close()
        self._folder.cleanup()


def _output() -> list[tuple[int, int]]:
    return [(s.st_dev, s.st_ino) for s in (os.fstat(1), os.fstat(2))]


_kept: dict[int, Ranks] = {}  # by how many they are
_owner = os.getpid()


def lend(world_size: int, backend: str) -> Ranks:
    """Ranks that wait for work: the kept ones, or new ones. `give_back` them."""
    if backend != "gloo":
        return Ranks(world_size, backend)
    global _owner
    if _owner != os.getpid():  # a fork has no say over its parent's ranks
        _kept.clear()
        _owner = os.getpid()
    ranks = _kept.pop(world_size, None)
    if ranks is not None and not ranks.as_forked_now():
        ranks.end()
        ranks = None
    return ranks or Ranks(world_size, backend)


def give_back(ranks: Ranks) -> None:
    """Keep them for the next call, or end them."""
    if ranks.spent or ranks.backend != "gloo":
        ranks.end()
    else:
        _kept[ranks.world_size] = ranks


def end_all() -> None:
    if _owner == os.getpid():
        for ranks in _kept.values():
            ranks.end()
    _kept.clear()


atexit.register(end_all)
