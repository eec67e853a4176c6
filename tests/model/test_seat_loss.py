"""Routers that learn to stay near: the seat loss and limited groups, held to the dense oracle on 1, 2 and 4 ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from luffy.config import RouterConfig
from luffy.data.batch import Layout, SequenceTable
from luffy.errors import UserError
from luffy.model.seat_loss import seat_stats

from .cases import Case, assert_exact, shrunk


def near(preset: str = "moe-llm-tiny", **changes: Any) -> Any:
    return shrunk(preset, **({"num_experts": 8, "top_k": 2, "seat_loss": 0.5} | changes))


@pytest.mark.parametrize(("form", "world"), [("mass", 1), ("mass", 4), ("rows", 2)])
def test_every_form_equals_the_oracle(form: str, world: int) -> None:
    told = assert_exact(Case(near(seat_loss_form=form), world=world, steps=3, micro_batches=2, num_topics=4))
    assert len(told.outputs[0].seat) == 2


@pytest.mark.parametrize("world", [1, 2])
def test_topics_need_not_be_as_many_as_ranks(world: int) -> None:
    """Eight topics on fewer ranks, beside the locality loss, with dropped choices and sigmoid scores."""
    config = near("moe-gpt2-tiny", score="sigmoid", capacity_factor=1.0, top_k=3, seat_loss_form="rows")
    assert_exact(Case(config, world=world, num_topics=8, padded=True, recompute=world == 2))


@pytest.mark.parametrize("world", [1, 4])
def test_tokens_that_choose_in_few_groups(world: int) -> None:
    config = near(num_groups=4, top_k_groups=2, top_k=3)
    told = assert_exact(Case(config, world=world, steps=2, num_topics=4))
    for layer in told.outputs[0].layers:
        for chosen in layer.chosen:
            assert int(chosen.unflatten(1, (4, 2)).any(-1).sum(-1).max()) <= 2


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"num_groups": 3, "top_k_groups": 1}, "--num-groups 3"),
        ({"num_groups": 4}, "--top-k-groups 0"),
        ({"top_k_groups": 2}, "--num-groups 0"),
        ({"num_groups": 8, "top_k_groups": 1, "top_k": 4}, "--top-k-groups 1"),
        ({"seat_loss": -1.0}, "--seat-loss"),
        ({"seat_loss_form": "none"}, "--seat-loss-form"),
    ],
)
def test_settings_that_cannot_work_are_named(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        RouterConfig(**({"num_experts": 16} | settings))


def test_traffic_counts_blocks_of_slots() -> None:
    """Two topics; experts 0 and 3 stand in the first block, 1 and 2 in the second."""
    table = SequenceTable(np.array([2, 1]), np.zeros(2, dtype=np.int64), np.array([1, 0]), 2)
    layout = Layout(table, 0, torch.device("cpu"))
    slots, chosen = torch.tensor([0, 2, 3, 1]), torch.tensor([[0, 3], [0, 1], [1, 2]])
    config = RouterConfig(num_experts=4, seat_loss=1.0)
    pull, traffic = seat_stats(torch.full((3, 4), 0.25), chosen, layout, slots, config)
    assert traffic.view(2, 2).tolist() == [[0, 1], [2, 1]]  # the token of topic 0 uses the second block alone
    assert float(pull) == pytest.approx(1.5)
    moved = layout.table.moved(np.array([0, 1]))
    assert moved.topic is table.topic and moved.num_topics == 2
