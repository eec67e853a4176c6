"""Where sequences and experts are makes no difference: empty ranks, idle experts, auxiliary losses."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from luffy.data.loader import IGNORE_INDEX
from luffy.data.loader import Sequence as TokenSequence
from luffy.testing import random_sequences, relative_error

from .cases import PRESETS, shrunk
from .placing import Trial, assert_all_exact

RECIPES = ("vanilla", "vanilla_dedup")
# Six sequences on four ranks: all on one, none on some, in unlike numbers.
HOMES = ((0,) * 6, (3,) * 6, (0, 1, 2, 3, 0, 1), (3, 2, 2, 1, 1, 1), (2, 0, 2, 0, 2, 0))


def without_labels(sequence: TokenSequence, keep: int = 0) -> TokenSequence:
    labels = np.where(np.arange(len(sequence.labels)) < keep, sequence.labels, IGNORE_INDEX)
    return dataclasses.replace(sequence, labels=labels)


@pytest.mark.parametrize("preset", PRESETS)
def test_any_placement_of_sequences(preset: str) -> None:
    config = shrunk(preset, num_shared_experts=1, capacity_factor=1.0 if "llm" in preset else None)
    sequences = random_sequences(6, config.vocab_size, seed=5)
    trials = [
        Trial(sequences, home, recipe, padded=i % 2 == 0, recompute=i % 3 == 0)
        for i, (home, recipe) in enumerate((h, r) for r in (*RECIPES, "netmoe") for h in HOMES)
    ]
    losses = {step.loss for step in assert_all_exact(config, 4, trials)}
    assert len(losses) == 1  # the oracle knows no ranks, so one loss stands for all trials


def test_any_placement_of_experts() -> None:
    """`slot_of_expert` says where experts live; the function does not change with it."""
    config = shrunk("moe-gpt2-tiny", top_k=3)
    sequences = random_sequences(4, config.vocab_size, seed=6)
    recipes, slots = (*RECIPES, "netmoe"), [(7, 6, 5, 4, 3, 2, 1, 0), (3, 0, 6, 1, 7, 4, 2, 5)]
    assert_all_exact(config, 4, [Trial(sequences, (0, 1, 2, 3), r, slots=s) for r in recipes for s in slots])


def test_ranks_whose_experts_get_no_row() -> None:
    """All tokens go to experts 0 and 1 of rank 0, then to experts 0 and 7: other experts' gradients are zero."""
    config = shrunk("moe-llm-tiny", bias_update_rate=0.001, normalize_topk=True, num_experts=8, top_k=2)
    sequences = random_sequences(4, config.vocab_size, seed=7)
    to_rank_0, to_both_ends = (9.0, 9.0, 0, 0, 0, 0, 0, 0), (9.0, 0, 0, 0, 0, 0, 0, 9.0)
    homes = ((0, 1, 2, 3), (1, 1, 1, 1))
    trials = [
        Trial(sequences, home, recipe, recompute=recipe == "vanilla", choice_bias=bias)
        for home in homes
        for recipe in RECIPES
        for bias in (to_rank_0, to_both_ends)
    ]
    for trial, step in zip(trials, assert_all_exact(config, 4, trials), strict=True):
        idle = [e for e in range(8) if not trial.choice_bias or trial.choice_bias[e] == 0]
        for name, gradient in step.gradients.items():
            if ".experts." in name:
                assert not gradient[idle].any()
                assert all(bool(gradient[e].any()) for e in range(8) if e not in idle)


@pytest.mark.parametrize("preset", ["moe-gpt2-tiny", "moe-bert-large-tiny"])
def test_more_experts_than_tokens(preset: str) -> None:
    """Four sequences of one token meet sixteen experts: most experts idle, some ranks without a row."""
    config = shrunk(preset, num_experts=16, top_k=1, normalize_topk=False)
    sequences = random_sequences(4, config.vocab_size, shortest=1, longest=1)
    trials = [Trial(sequences, home, r) for home in ((0, 1, 2, 3), (2, 2, 2, 2)) for r in RECIPES]
    for step in assert_all_exact(config, 4, trials):
        (used,) = {
            int(g.flatten(1).any(1).sum()) for n, g in step.gradients.items() if n.endswith("0.moe.experts.w_in")
        }
        assert used <= 4


@pytest.mark.parametrize("score", ["softmax", "sigmoid"])
def test_auxiliary_losses_reach_the_gradient(score: str) -> None:
    """With one label, then none, what is left of the loss is the auxiliaries, and routers feel them."""
    config = shrunk("moe-gpt2-tiny", balance_loss=1.0, z_loss=0.1, locality_loss=0.2, score=score)
    sequences = random_sequences(4, config.vocab_size, seed=8)
    one = [without_labels(s, keep=int(i == 2)) for i, s in enumerate(sequences)]
    none = [without_labels(s) for s in sequences]
    trials = [Trial(data, home) for data in (one, none) for home in ((0, 1, 2, 3), (3, 3, 0, 0), (1, 1, 1, 1))]
    steps = assert_all_exact(config, 4, trials)
    silent = config.override(balance_loss=0.0, z_loss=0.0, locality_loss=0.0)
    quiet = assert_all_exact(silent, 2, [Trial(one, (0, 1, 0, 1)), Trial(none, (0, 1, 0, 1))])
    for layer in range(config.num_layers):
        router = f"blocks.{layer}.moe.router.weight"
        assert relative_error(quiet[0].gradients[router], steps[0].gradients[router]) > 0.1
        assert steps[-1].gradients[router].any() and not quiet[1].gradients[router].any()


@pytest.mark.parametrize("weight", ["balance_loss", "z_loss", "locality_loss"])
def test_each_auxiliary_loss_alone(weight: str) -> None:
    config = shrunk(
        "moe-bert-large-tiny", **({"balance_loss": 0.0, "z_loss": 0.0, "locality_loss": 0.0} | {weight: 0.5})
    )
    sequences = [without_labels(s) for s in random_sequences(4, config.vocab_size, seed=9)]
    (step,) = assert_all_exact(config, 2, [Trial(sequences, (0, 1, 1, 1))])
    # Locality is minus a mutual information: never above zero.
    assert step.loss < 0 if weight == "locality_loss" else step.loss > 0
    assert step.gradients["blocks.0.moe.router.weight"].any()
