"""Run many named functions on the same ranks, one after another, in one launch.

To start processes, a GPU's context and NCCL takes seconds, and a test of a small model much less; so tests of one
number of ranks share a launch, and each is still reported by its own name:

    outcomes = run_together({"sum": (add_up, 3), "mean": (average,)}, world_size=2, backend="nccl")
    outcomes["sum"].get()        # what each rank gave back; raises RankFailedError if one of them failed

After each case the ranks wait for the parent's word. If all of them answered and one had failed, they leave their
process group and form a new one, since a collective may have been entered by some only. If a rank died, or does not
answer within `grace_seconds` of another's failure (it waits in a collective that the failed one never entered), all are
ended and the remaining cases get a fresh launch. No failure thus reaches another case, and one launch is all it takes
where none fails.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.reduction import ForkingPickler
from typing import Any

import torch
import torch.distributed as dist

from luffy.testing.ranks import RankFailedError, context_for, join, start_all

Work = tuple[Any, ...]  # a function that is called with its rank, and its other arguments


@dataclass(frozen=True)
class Outcome:
    """What became of a case: `values` by rank, or `error`, the traceback of the first rank that failed."""

    values: list[Any] | None
    error: str | None

    def get(self) -> list[Any]:
        """The values; raises RankFailedError where there are none."""
        if self.values is None:
            raise RankFailedError(self.error)
        return self.values


@dataclass(frozen=True)
class _Word:
    """The parent's, after a case: go on, in the process group that is there or in a new one that meets at `store`."""

    store: str | None = None


def _serve(rank: int, world: int, store: str, backend: str, cases: Sequence[Work], pipe: Connection) -> None:
    """A rank: all cases in turn, an answer after each. (None, traceback) says that there is no world to run them in."""
    try:
        join(rank, world, store, backend)
    except BaseException:
        pipe.send((None, traceback.format_exc()))
        os._exit(0)
    try:
        for fn, *args in cases:
            pipe.send_bytes(_answer(fn, rank, args))
            word: _Word = pipe.recv()
            if word.store is not None:
                dist.destroy_process_group()
                join(rank, world, word.store, backend)
        dist.barrier()
    except BaseException:
        with contextlib.suppress(OSError):
            pipe.send((False, traceback.format_exc()))
    # Skip the interpreter's shutdown: a forked child must not run its parent's exit handlers.
    os._exit(0)


def _answer(fn: Callable[..., Any], rank: int, args: Sequence[Any]) -> Any:
    """(whether it went well, the value or the traceback), as bytes. A value that cannot be sent is a failure too."""
    try:
        answer = ForkingPickler.dumps((True, fn(rank, *args)))
    except BaseException:
        answer = ForkingPickler.dumps((False, traceback.format_exc()))
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()  # what is still under way belongs to this case, its failures too
    except BaseException:
        answer = ForkingPickler.dumps((False, traceback.format_exc()))
    return answer


def run_together(
    cases: Mapping[str, Work],
    world_size: int,
    *,
    backend: str = "gloo",
    case_seconds: float = 120.0,
    grace_seconds: float = 10.0,
) -> dict[str, Outcome]:
    """Call each case's `fn(rank, *args)` on `world_size` ranks, one case after another; the outcome of each.

    cases: by name, (fn, *args), importable as for `run_ranks`; results likewise. case_seconds: how long a case may
    take, the start of the ranks included. grace_seconds: for ranks to end a case in which another has failed.
    """
    outcomes: dict[str, Outcome] = {}
    while left := {name: work for name, work in cases.items() if name not in outcomes}:
        outcomes |= _launch(left, world_size, backend, case_seconds, grace_seconds)
    return outcomes


def _launch(
    cases: Mapping[str, Work], world_size: int, backend: str, case_seconds: float, grace_seconds: float
) -> dict[str, Outcome]:
    """One launch, as far as it comes: at least the first case."""
    context = context_for(backend)
    outcomes: dict[str, Outcome] = {}
    pipes = [context.Pipe() for _ in range(world_size)]
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        children = [
            context.Process(
                target=_serve, args=(r, world_size, store, backend, list(cases.values()), pipes[r][1]), daemon=True
            ) for r in range(world_size)
        ]  # fmt: skip
        start_all(children)
        try:
            for name in cases:
                answers, lost = _gather([ours for ours, _ in pipes], children, case_seconds, grace_seconds)
                failed = [f"rank {r} failed:\n{value}" for r, (well, value) in answers.items() if not well]
                if any(well is None for well, _ in answers.values()):
                    return outcomes | {other: Outcome(None, failed[0]) for other in cases if other not in outcomes}
                error = "\n".join([*lost, *failed[:1]]) or None
                values = None if error else [answers[r][1] for r in range(world_size)]
                outcomes[name] = Outcome(values, error)
                if lost:
                    break
                word = _Word(os.path.join(folder, f"store-{len(outcomes)}") if error else None)
                for ours, _ in pipes:
                    with contextlib.suppress(OSError):  # a rank that has died since is found in the next case
                        ours.send(word)
            else:
                for child in children:
                    child.join(grace_seconds)
        finally:
            for child in children:
                child.kill()
                child.join()
            for pair in pipes:
                for end in pair:
                    end.close()
    return outcomes


def _gather(
    pipes: Sequence[Connection], children: Sequence[Any], case_seconds: float, grace_seconds: float
) -> tuple[dict[int, tuple[bool | None, Any]], list[str]]:
    """The ranks' answers to a case by rank, in the order in which they came, and what is wrong with silent ranks."""
    answers: dict[int, tuple[bool | None, Any]] = {}
    deadline = time.monotonic() + case_seconds
    while len(answers) < len(pipes):
        waiting = [r for r in range(len(pipes)) if r not in answers]
        ready = wait([pipes[r] for r in waiting] + [children[r].sentinel for r in waiting], 0.5)
        for r in waiting:
            if pipes[r] in ready or (children[r].sentinel in ready and pipes[r].poll()):
                with contextlib.suppress(EOFError):
                    answers[r] = pipes[r].recv()
                    if not answers[r][0]:
                        deadline = min(deadline, time.monotonic() + grace_seconds)
                    continue
            if not children[r].is_alive() and r not in answers:
                return answers, [f"rank {r} died without a word"]
        if time.monotonic() > deadline and len(answers) < len(pipes):
            silent = [r for r in range(len(pipes)) if r not in answers]
            return answers, [f"no answer from ranks {silent}"]
    return answers, []
