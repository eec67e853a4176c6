"""Run a function, or many, on several real ranks: processes that talk over gloo, or over NCCL with a GPU each.

    run_ranks(add_up, 2, 3)      # [add_up(0, 3), add_up(1, 3)]
    outcomes = run_together({"sum": (add_up, 3), "mean": (average,)}, world_size=2, backend="nccl")
    outcomes["sum"].get()        # what each rank gave back; raises RankFailedError if one of them failed

Ranks over gloo wait for the next call (pool.py), so that a call costs milliseconds. Over NCCL a call starts them, which
takes seconds: tests of one number of ranks do well to share a call. No failure of a case reaches another one: ranks
that died, or do not answer, are replaced; ranks that all answered, one of them with a failure, form a new process
group, since a collective may have been entered by some only.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from luffy.testing.pool import Ranks, give_back, lend

Work = tuple[Any, ...]  # a function that is called with its rank, and its other arguments


class RankFailedError(AssertionError):
    """A rank raised: carries its number and its traceback."""


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


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout_seconds: float = 300.0, backend: str = "gloo"
) -> list[Any]:
    """Call `fn(rank, *args)` on `world_size` ranks; the results (picklable, no live tensors) in rank order.

    backend: "gloo", or "nccl", where rank r has GPU r. `fn` must be importable by its name, arguments picklable.
    Raises `RankFailedError` with the traceback of the first rank that failed, or that one did not answer in time.
    """
    case = {"": (fn, *args)}
    return run_together(case, world_size, backend=backend, case_seconds=timeout_seconds, grace_seconds=0.5)[""].get()


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
    ranks: Ranks | None = None
    try:
        for name, (fn, *args) in cases.items():
            if ranks is None or ranks.spent:
                if ranks is not None:
                    ranks.end()
                ranks = lend(world_size, backend)
            answers, lost = ranks.run(fn, args, case_seconds, grace_seconds)
            failed = [f"rank {r} failed:\n{value}" for r, (well, value) in answers.items() if not well]
            error = "\n".join([*lost, *failed[:1]]) or None
            outcomes[name] = Outcome(None if error else [answers[r][1] for r in range(world_size)], error)
            if any(well is None for well, _ in answers.values()):  # no world, so the others fail alike
                return outcomes | {other: Outcome(None, error) for other in cases if other not in outcomes}
    except BaseException:  # interrupted: nobody knows what the ranks are doing
        if ranks is not None:
            ranks.end()
        raise
    finally:
        if ranks is not None:
            give_back(ranks)
    return outcomes
