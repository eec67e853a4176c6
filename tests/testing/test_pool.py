"""Ranks that are kept find at each call what a fork would have found, and carry nothing from one call to the next."""

from __future__ import annotations

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from luffy import wire_format
from luffy.testing import pool, run_ranks


def surroundings(rank: int) -> tuple:
    drawn = torch.rand(1).item(), float(np.random.rand()), random.random()
    return os.getpid(), os.getcwd(), os.environ.get("LUFFY_TEST"), dist.get_world_size(), torch.get_num_threads(), drawn


def pids() -> list[int]:
    return [answer[0] for answer in run_ranks(surroundings, 2)]


def test_ranks_are_kept_and_each_call_has_the_parents_folder_environment_and_fresh_seeds(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = run_ranks(surroundings, 2)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LUFFY_TEST", "here")
    there = run_ranks(surroundings, 2)
    assert [a[0] for a in before] == [a[0] for a in there] and before[0][0] != before[1][0]
    assert [a[1:3] for a in there] == [(str(tmp_path), "here")] * 2
    assert before[0][5] == before[1][5] == there[0][5] == there[1][5]
    monkeypatch.undo()
    assert [a[:3] for a in run_ranks(surroundings, 2)] == [a[:3] for a in before]


def litter(rank: int) -> None:
    torch.set_default_dtype(torch.float64)
    torch.set_num_threads(2)
    os.environ["LUFFY_TEST"] = "left behind"
    os.chdir("/")


def test_what_a_call_leaves_in_its_surroundings_does_not_reach_the_next() -> None:
    before = run_ranks(surroundings, 2)
    run_ranks(litter, 2)
    assert run_ranks(surroundings, 2) == before


def block(rank: int) -> int:
    return wire_format.BLOCK


def patch_block(rank: int) -> None:
    if rank == 1:
        wire_format.BLOCK = 99


def test_a_patch_of_the_parent_reaches_the_ranks_and_leaves_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = wire_format.BLOCK
    assert run_ranks(block, 2) == [usual] * 2
    monkeypatch.setattr(wire_format, "BLOCK", 7)
    assert run_ranks(block, 2) == [7, 7]
    monkeypatch.undo()
    assert run_ranks(block, 2) == [usual] * 2


def known_sets(rank: int) -> list[str]:
    return sorted(wire_format.WIRE_SETS)


def test_what_the_parent_registers_reaches_the_ranks_and_leaves_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = run_ranks(known_sets, 1)[0]
    monkeypatch.setitem(wire_format.WIRE_SETS, "mine", "int8")
    assert run_ranks(known_sets, 1)[0] == sorted([*usual, "mine"])
    monkeypatch.undo()
    assert run_ranks(known_sets, 1)[0] == usual


def test_ranks_that_a_call_has_patched_are_replaced() -> None:
    usual, before = wire_format.BLOCK, pids()
    run_ranks(patch_block, 2)
    assert run_ranks(block, 2) == [usual] * 2
    assert not set(before) & set(pids())


def leave(rank: int) -> None:
    dist.destroy_process_group()


def test_ranks_without_a_process_group_are_replaced() -> None:
    run_ranks(leave, 2)
    assert [answer[3] for answer in run_ranks(surroundings, 2)] == [2, 2]


def total(rank: int) -> float:
    group = dist.new_group([0, 1])
    x = torch.tensor([1.0 + rank])
    dist.all_reduce(x, group=group)
    return float(x)


def count_groups(rank: int) -> int:
    return len(dist.distributed_c10d._world.pg_map)


def test_process_groups_do_not_pile_up() -> None:
    for _ in range(20):
        assert run_ranks(total, 2) == [3.0, 3.0]
    assert max(run_ranks(count_groups, 2)) <= pool._JOBS_A_GROUP
