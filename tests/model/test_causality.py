"""No future reaches a past logit, through no part of the model: attention, routing, capacity or exchange."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from luffy.recipes import RECIPES
from luffy.testing import run_ranks

from .cases import DECODERS, Case, shrunk
from .leaks import LENGTH, states_and_outputs

# The perturbed token moves the rows of its own place by about 1. Rows that must not move may round differently,
# because the experts' matrix products have other rows in them.
STILL = 1e-12


@torch.no_grad()
def states_when_tokens_change(rank: int, case: Case, changes: list[tuple[int, int] | None]) -> list[np.ndarray]:
    """The states alone, as in evaluation."""
    return [states for states, _ in states_and_outputs(case, changes)]


@pytest.mark.parametrize(
    ("recipe", "capacity_factor"), [("vanilla_dedup", None), *((recipe, 0.7) for recipe in RECIPES)]
)
@pytest.mark.parametrize("preset", DECODERS)
def test_the_past_does_not_move(preset: str, recipe: str, capacity_factor: float | None) -> None:
    config = shrunk(preset, capacity_factor=capacity_factor, num_shared_experts=1)
    case = Case(config, world=2, recipe=recipe, padded=recipe == "vanilla")
    changes = [None, (0, 0), (1, 5), (2, 6), (3, LENGTH - 1)]
    before, *after = run_ranks(states_when_tokens_change, 2, case, changes)[0]
    for change, states in zip(changes[1:], after, strict=True):
        assert change is not None
        sequence, where = change
        moved = np.abs(states - before).max(-1)  # [sequences, LENGTH]
        assert moved[sequence, where] > 1e-2
        assert moved[sequence, where:].max() == moved.max()
        moved[sequence, where:] = 0
        assert moved.max() < STILL * np.abs(before).max(), f"token {change} moved {np.argwhere(moved > 1e-9)}"


def test_an_encoder_does_see_the_future() -> None:
    """The same probe on BERT finds movement before the changed token: the probe is able to see a leak."""
    case = Case(shrunk("moe-bert-large-tiny"), world=2)
    before, after = run_ranks(states_when_tokens_change, 2, case, [None, (1, 5)])[0]
    moved = np.abs(after - before).max(-1)
    assert moved[1, :5].min() > 1e-6
    moved[1] = 0
    assert moved.max() < STILL * np.abs(before).max()  # but other sequences stay still
