"""The distributed model computes the oracle's function: loss, every gradient, every weight after training.

Each case runs three AdamW steps of two accumulated micro-batches on real ranks, in float64, and has to agree to 1e-10
of the largest element of each tensor.
"""

from __future__ import annotations

import itertools
from typing import Any

import pytest

from .cases import TINY_PRESETS, Case, assert_exact, shrunk
from .covering import all_pairs, covering_rows, pairs_of

BASE = {"preset": TINY_PRESETS, "world": (1, 2, 4), "recipe": ("vanilla", "vanilla_dedup")}
OTHERS: dict[str, tuple[Any, ...]] = {
    "padded": (False, True),
    "recompute": (False, True),
    "top_k": (1, 2, 4),
    "num_shared_experts": (0, 1),
    "score": ("softmax", "sigmoid"),
    "bias_update_rate": (0.0, 0.001),
    "capacity_factor": (None, 1.0),
    "moe_every": (1, 2),
    "normalize_topk": (False, True),
    "lengths": ("uneven", "equal", "short"),
}
MODEL_SETTINGS = (
    "top_k",
    "num_shared_experts",
    "score",
    "bias_update_rate",
    "capacity_factor",
    "moe_every",
    "normalize_topk",
)


def case_of(row: dict[str, Any], **changes: Any) -> Case:
    config = shrunk(row["preset"], **{name: row[name] for name in MODEL_SETTINGS})
    run = {name: row[name] for name in ("world", "recipe", "padded", "recompute", "lengths")}
    labelled = 1.0 if config.causal else 0.4  # a masked-language model is trained on some places only
    return Case(config, **run, labelled=labelled, **changes)


def name_of(row: dict[str, Any]) -> str:
    return "-".join(f"{name[:5]}={row[name]}" if name not in BASE else str(row[name]) for name in row)


ROWS = covering_rows(BASE, OTHERS)


def test_rows_cover_every_pair_of_settings() -> None:
    assert not all_pairs({**BASE, **OTHERS}) - set().union(*map(pairs_of, ROWS))


@pytest.mark.parametrize("row", ROWS, ids=name_of)
def test_three_training_steps(row: dict[str, Any]) -> None:
    assert_exact(case_of(row, micro_batches=2, steps=3))


def test_clipping_by_the_norm_of_all_gradients() -> None:
    assert_exact(Case(shrunk("moe-llm-tiny"), world=2, steps=3, clip_norm=0.5))


@pytest.mark.parametrize("recipe", BASE["recipe"])
def test_expert_groups_side_by_side(recipe: str) -> None:
    """Four ranks as two copies of an expert-parallel pair: an expert's gradient is the sum over its copies."""
    config = shrunk("moe-gpt2-tiny", num_shared_experts=1)
    assert_exact(Case(config, world=4, ep_size=2, recipe=recipe, micro_batches=2, steps=3))


@pytest.mark.parametrize("changes", [{"causal": False}, {"causal": False, "position": "rope"}], ids=str)
@pytest.mark.parametrize("padded", [False, True])
def test_encoders_with_relative_and_rotary_positions(changes: dict[str, Any], padded: bool) -> None:
    """No preset is an encoder with these positions, but the configuration allows them (distances turn negative)."""
    config = shrunk("moe-transformer-xl-tiny", **changes)
    assert_exact(Case(config, world=2, padded=padded))


def test_a_model_without_experts() -> None:
    config = shrunk("moe-gpt2-tiny", moe_every=3)
    assert config.num_moe_layers == 0
    assert_exact(Case(config, world=2, padded=True))


def test_capacity_that_drops_choices() -> None:
    """With room for half of the choices; the oracle says that some were in fact dropped in every layer."""
    config = shrunk("moe-llm-tiny", capacity_factor=0.5, top_k=4)
    for layer in assert_exact(Case(config, world=2, padded=True)).outputs[0].layers:
        assert any(bool((chosen & ~served).any()) for chosen, served in zip(layer.chosen, layer.served, strict=True))


CROSSED = ("recipe", "padded", "recompute", "top_k", "capacity_factor")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("preset", "world"),
    [("moe-gpt2-tiny", 4), ("moe-bert-large-tiny", 2), ("moe-transformer-xl-tiny", 2), ("moe-llm-tiny", 4)],
)
def test_the_full_product_of_exchange_settings(preset: str, world: int) -> None:
    """What acts on the exchange in full product; the other settings differ from row to row."""
    factors = {**BASE, **OTHERS}
    rest = [name for name in OTHERS if name not in CROSSED]
    for i, values in enumerate(itertools.product(*(factors[name] for name in CROSSED))):
        # Strides without a common factor, so that the settings do not move in step.
        others = {name: factors[name][i // (2 * j + 1) % len(factors[name])] for j, name in enumerate(rest)}
        row = {"preset": preset, "world": world, **dict(zip(CROSSED, values, strict=True)), **others}
        try:
            assert_exact(case_of(row))
        except AssertionError as error:
            raise AssertionError(f"{name_of(row)}: {error}") from error
