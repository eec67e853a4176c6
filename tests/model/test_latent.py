"""Latent rows: the dense oracle's function on real ranks, in fewer bytes."""

from __future__ import annotations

from typing import Any

import pytest

from luffy.config import ModelConfig
from luffy.errors import UserError
from luffy.recipes import get_recipe
from luffy.testing import run_ranks
from luffy.train.memory import count_parameters
from luffy.train.options import TrainOptions

from .cases import Case, assert_exact, build, run_step, shrunk

LATENT = {"latent_size": 8, "num_shared_experts": 1}


@pytest.mark.parametrize(
    ("world", "preset", "changes"),
    [
        (1, "moe-gpt2-tiny", {}),
        (2, "moe-bert-large-tiny", {"recipe": "vanilla"}),
        (4, "moe-llm-tiny", {"recompute": True, "padded": True}),
        (2, "moe-llm-tiny", {"recipe": "janus", "overlap": True, "micro_batches": 2, "num_topics": 4}),
    ],
)
def test_latent_rows_equal_the_oracle(world: int, preset: str, changes: dict[str, Any]) -> None:
    config = shrunk(preset, **LATENT, seat_loss=0.3)
    labelled = 1.0 if config.causal else 0.4
    assert_exact(Case(config, world=world, steps=2, labelled=labelled, **changes))


def bytes_of(rank: int, case: Case) -> int:
    model, comm = build(case)
    run_step(model, comm, case, case.data()[0])
    return int(comm.meter.take()[:4].sum())  # rows, out and back, forward and backward


def test_rows_shrink_with_their_width() -> None:
    whole, narrow = (
        sum(run_ranks(bytes_of, 2, Case(shrunk("moe-llm-tiny", latent_size=size), world=2))) for size in (0, 8)
    )
    assert 0 < narrow <= 0.35 * whole  # 8 of 32 elements; the choices are not what they were, in the second layer


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(UserError, match="--latent-size 768 must be below"):
        ModelConfig(latent_size=768)
    for recipe in ("luffy_paper", "netmoe", "lsh_moe"):
        with pytest.raises(UserError, match="--latent-size 16 cannot be combined"):
            TrainOptions(model="moe-gpt2-tiny", recipe=recipe, latent_size=16)
    assert get_recipe("luffy").name == TrainOptions(model="moe-gpt2-tiny", recipe="luffy", latent_size=16).recipe


def test_weights_are_counted() -> None:
    whole, narrow = (shrunk("moe-gpt2-tiny", latent_size=size) for size in (0, 8))
    replicated, own = (b - a for a, b in zip(count_parameters(whole, 2), count_parameters(narrow, 2), strict=True))
    assert replicated == 2 * 2 * 32 * 8 and own == -2 * 4 * 2 * 24 * (32 - 8)
