"""Where a sequence is computed changes nothing: seated steps are the oracle's in loss, gradients, trained weights."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from luffy.comm.meter import by_direction
from luffy.recipes import get_recipe
from luffy.testing import gather_full, run_ranks

from .cases import Case, build, check_exact, run_step, shrunk, train_on_ranks
from .condensing import check_condensed_exact, condensed_step
from .leaks import LENGTH, seated_states

DEDUP = get_recipe("vanilla_dedup")
WAYS: dict[int, list[dict[str, Any]]] = {
    1: [{"seats": "random", "micro_batches": 2}],
    2: [
        {"seats": "random", "micro_batches": 2, "overlap": True, "shared": 1},
        {"seats": "learnt", "padded": True, "rehome_after": (0,)},
    ],
    4: [
        {"seats": "random", "micro_batches": 2, "recompute": True, "lengths": "equal"},
        {"seats": "learnt", "micro_batches": 2, "ep_size": 2, "shared": 1, "overlap": True},
        {"seats": "random", "ep_size": 2, "capacity": 0.7},
    ],
}


def _case(world: int, way: dict[str, Any]) -> Case:
    way = dict(way)
    config = shrunk("moe-gpt2-tiny", num_shared_experts=way.pop("shared", 0), capacity_factor=way.pop("capacity", None))
    return Case(config, world, recipe=DEDUP, batch=8, steps=2, **way)


def _all(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [train_on_ranks(rank, case) for case in cases]


@pytest.mark.parametrize("world", WAYS)
def test_seated_steps_equal_the_oracle(world: int) -> None:
    cases = [_case(world, way) for way in WAYS[world]]
    results = run_ranks(_all, world, cases)
    for i, case in enumerate(cases):
        check_exact(case, [r[i] for r in results])
        batch, seating = case.seat(case.data()[0])
        assert world == 1 or (seating.rank != np.arange(len(batch)) * world // len(batch)).any(), "nobody moved"


def _condensed(rank: int, cases: list[Case]) -> list[dict[str, Any]]:
    return [condensed_step(rank, case) for case in cases]


def test_seated_and_condensed_with_correction_equals_the_oracle() -> None:
    recipe = replace(DEDUP, condense="static:0.3,correct")
    case = Case(shrunk("moe-gpt2-tiny"), 2, recipe=recipe, batch=8, seats="random")
    results = run_ranks(_condensed, 2, [case])
    assert check_condensed_exact(case, [r[0] for r in results]) < 1


def _coded(rank: int, cases: list[Case]) -> list[tuple[float, np.ndarray, dict[str, int]]]:
    out = []
    for case in cases:
        model, comm = build(case)
        comm.meter.take()
        loss = float(run_step(model, comm, case, case.data()[0])[0])
        counted = by_direction(comm.meter.read())
        gradient = np.concatenate([g.numpy().ravel() for g in gather_full(model, "grad").values()])
        out.append((loss, gradient, counted))
    return out


def test_low_bits_round_what_seats_leave_to_travel_and_no_more() -> None:
    """With every row rounded, who sits where makes no difference; bytes are the rows' that leave their rank."""
    exact = Case(shrunk("moe-gpt2-tiny"), 4, recipe=DEDUP, batch=8, lengths="equal")
    ways = [replace(exact, recipe=replace(DEDUP, wire=f"{wire},local")) for wire in ("int8", "int4")]
    cases = [exact, *(replace(case, seats=seats) for case in ways for seats in ("", "random"))]
    for got in run_ranks(_coded, 4, cases):
        for stayed, seated in ((got[1], got[2]), (got[3], got[4])):
            off = np.linalg.norm(stayed[1] - got[0][1])
            assert off > 0 and np.linalg.norm(seated[1] - stayed[1]) < 1e-8 * off
            assert seated[2]["dispatch"] % (34 if stayed is got[1] else 18) == 0


def _leak(rank: int, case: Case, changes: list[tuple[int, int] | None]) -> list[np.ndarray]:
    return seated_states(case, changes)


@pytest.mark.parametrize("recipe", ["luffy", "luffy_max"])
def test_no_future_reaches_a_token_through_seats(recipe: str) -> None:
    """A seat follows from the whole sequence, its end included; no past state may move with it."""
    case = Case(shrunk("moe-gpt2-tiny"), 2, recipe=get_recipe(recipe), batch=8, seats="learnt")
    changes = [None, (1, 5), (2, 9), (3, LENGTH - 1)]
    before, *after = run_ranks(_leak, 2, case, changes)[0]
    for change, states in zip(changes[1:], after, strict=True):
        assert change is not None
        moved = np.abs(states - before).max(-1)
        assert moved[change] > 1e-2
        assert moved[:, : change[1]].max(initial=0) < 1e-12 * np.abs(before).max()
