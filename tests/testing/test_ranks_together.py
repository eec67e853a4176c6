"""Cases that share a launch: each has its own outcome, whatever another did to the ranks."""

import os
import time

import pytest
import torch
import torch.distributed as dist

from luffy.testing import RankFailedError, run_together


def total(rank, factor):
    x = torch.tensor([float(factor * (rank + 1))])
    dist.all_reduce(x)
    return float(x), os.getpid()


def fail_alone(rank, bad):
    """All enter a collective, but for the rank that failed before."""
    if rank == bad:
        raise ValueError(f"rank {bad} has had enough")
    dist.barrier()


def fail_afterwards(rank, bad):
    dist.barrier()
    assert rank != bad, "one rank sees a wrong number"


def skip_a_collective(rank, bad):
    """A message that nobody takes; then all fail."""
    if rank != bad:
        dist.isend(torch.zeros(1000), bad)
    raise ValueError("all of us")


def die(rank, bad):
    if rank == bad:
        os._exit(3)
    dist.barrier()


def hang(rank, bad):
    if rank == bad:
        time.sleep(60)


def give_what_cannot_be_sent(rank):
    return (x for x in ())


def test_each_case_has_its_own_outcome_and_those_that_pass_share_processes():
    found = run_together(
        {"one": (total, 1), "two": (total, 2), "afterwards": (fail_afterwards, 1), "three": (total, 3),
         "skipped": (skip_a_collective, 1), "unsendable": (give_what_cannot_be_sent,), "four": (total, 4)},
        2,
    )  # fmt: skip
    assert list(found) == ["one", "two", "afterwards", "three", "skipped", "unsendable", "four"]
    sums = {name: [value for value, _ in found[name].get()] for name in ("one", "two", "three", "four")}
    assert sums == {"one": [3.0] * 2, "two": [6.0] * 2, "three": [9.0] * 2, "four": [12.0] * 2}
    # Ranks that all answered go on, in a new process group, without a new launch.
    assert len({tuple(pid for _, pid in found[name].get()) for name in sums}) == 1
    with pytest.raises(RankFailedError, match="one rank sees a wrong number") as caught:
        found["afterwards"].get()
    assert "rank 1 failed" in str(caught.value) and "fail_afterwards" in str(caught.value)
    assert "all of us" in str(found["skipped"].error)
    assert "generator" in str(found["unsendable"].error)


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 2])
def test_a_rank_that_fails_dies_or_hangs_alone_is_named_and_the_rest_run_anew(bad):
    began = time.monotonic()
    found = run_together(
        {"before": (total, 1), "alone": (fail_alone, bad), "between": (total, 2), "dies": (die, bad),
         "hangs": (hang, bad), "after": (total, 3)},
        3, case_seconds=6.0, grace_seconds=1.0,
    )  # fmt: skip
    assert time.monotonic() - began < 50
    assert [[value for value, _ in found[name].get()] for name in ("before", "between", "after")] == [
        [6.0] * 3, [12.0] * 3, [18.0] * 3,
    ]  # fmt: skip
    assert f"rank {bad} has had enough" in str(found["alone"].error)
    assert f"rank {bad} died without a word" in str(found["dies"].error)
    assert f"no answer from ranks [{bad}]" in str(found["hangs"].error)
    assert found["before"].get()[0][1] != found["after"].get()[0][1]


def test_a_world_that_cannot_form_is_a_failure_of_each_case():
    found = run_together({"a": (total, 1), "b": (total, 2)}, 2, backend="no such backend", case_seconds=30)
    assert len(found) == 2
    assert all("no such backend" in str(outcome.error) for outcome in found.values())
