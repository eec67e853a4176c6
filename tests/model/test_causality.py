"""No future reaches a past logit, through no part of the model: attention, routing, capacity or exchange."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from luffy.testing import random_sequences, run_ranks

from .cases import DECODERS, Case, build, shrunk
from .placing import Trial, place

# The perturbed token moves the rows of its own place by about 1. Rows that must not move may round differently,
# because the experts' matrix products have other rows in them.
STILL = 1e-12
LENGTH = 12


@torch.no_grad()
def states_when_tokens_change(rank: int, case: Case, changes: list[tuple[int, int] | None]) -> list[Any]:
    """For each (sequence, place) whose token changes (None: none): the last states, [sequences, LENGTH, D]."""
    model, comm = build(case)
    last: list[Tensor] = []
    last_module = model.final_norm if model.final_norm is not None else model.blocks[-1]
    last_module.register_forward_hook(lambda _, __, out: last.append(out if torch.is_tensor(out) else out.hidden))
    results = []
    for change in changes:
        sequences = random_sequences(case.batch, case.config.vocab_size, seed=11, lengths="equal", longest=LENGTH)
        if change is not None:
            sequence, where = change
            tokens = sequences[sequence].tokens
            tokens[where] = (tokens[where] + 41) % case.config.vocab_size
        home = tuple(i % comm.mesh.world_size for i in range(case.batch))
        last.clear()
        model(place(Trial(sequences, home, padded=case.padded), comm))
        gathered = comm.all_gather_world(last[0].unflatten(0, (-1, LENGTH)))  # [world, local, LENGTH, D]
        results.append(gathered.transpose(0, 1).flatten(0, 1).numpy())
    return results


@pytest.mark.parametrize("capacity_factor", [None, 0.7])
@pytest.mark.parametrize("recipe", ["vanilla", "vanilla_dedup"])
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
