"""`run_ranks` itself: answers in order, and no failure of a rank goes unnoticed or unnamed."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from luffy.testing import RankFailedError, run_ranks


def answer(rank: int, factor: int) -> tuple[int, int, int]:
    value = torch.tensor([rank])
    dist.all_reduce(value)
    return rank * factor, int(value), int(os.environ["LOCAL_WORLD_SIZE"])


@pytest.mark.parametrize("world", [1, 3])
def test_answers_come_in_order_of_rank(world: int) -> None:
    expected = [(10 * r, sum(range(world)), world) for r in range(world)]
    assert run_ranks(answer, world, 10) == expected


def raising(rank: int) -> None:
    if rank == 1:
        raise KeyError("the broken one")
    dist.barrier()  # never completes: the error has to come through all the same


def test_a_rank_that_raises_is_reported_with_its_traceback() -> None:
    with pytest.raises(RankFailedError, match=r"rank 1 failed:[\s\S]*in raising[\s\S]*the broken one"):
        run_ranks(raising, 3)


def dying(rank: int, others_wait: bool) -> None:
    dist.barrier()
    if rank == 2:
        time.sleep(0.5)  # the others have left the barrier, which still needs this rank's socket
        os._exit(9)
    if others_wait:
        time.sleep(60)


def test_a_rank_that_dies_is_reported() -> None:
    """Killed for memory, say: nothing it could have said."""
    began = time.monotonic()
    with pytest.raises(RankFailedError, match="rank 2 died"):
        run_ranks(dying, 3, True)
    assert time.monotonic() - began < 30


def test_a_rank_that_dies_while_others_talk_to_it_fails_the_run() -> None:
    with pytest.raises(RankFailedError):
        run_ranks(dying, 3, False)


def hanging(rank: int) -> int:
    while rank == 1:
        time.sleep(0.1)
    return rank


def test_a_rank_that_hangs_is_named_when_time_is_up() -> None:
    began = time.monotonic()
    with pytest.raises(RankFailedError, match=r"no answer from ranks \[.*1.*\]"):
        run_ranks(hanging, 2, timeout_seconds=2.0)
    assert time.monotonic() - began < 30


def unpicklable(rank: int) -> object:
    return lambda: rank


def test_an_answer_that_cannot_travel_is_a_failure() -> None:
    with pytest.raises(RankFailedError):
        run_ranks(unpicklable, 1, timeout_seconds=5.0)
