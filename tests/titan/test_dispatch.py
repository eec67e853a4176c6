"""The dispatcher by itself, and what the overrides refuse."""

from __future__ import annotations

import pytest

pytest.importorskip("torchtitan", reason="torchtitan is not installed: pip install 'luffy-moe[titan]' to test it")

import torch
from torchtitan.models.common.token_dispatcher import (
    AllToAllTokenDispatcher,
    DeepEPTokenDispatcher,
    TorchAOTokenDispatcher,
)

import luffy.titan
from luffy.errors import UserError
from luffy.testing import run_ranks
from luffy.titan.dispatch import LuffyTokenDispatcher
from tests.titan.cases import one_layer


@pytest.mark.parametrize(("world_size", "top_k"), [(2, 3), (4, 5), (4, 1)])
def test_a_layer_is_that_of_a_dense_loop_and_sends_a_row_once_a_rank(world_size: int, top_k: int) -> None:
    for found in run_ranks(one_layer, world_size, top_k):
        for name in ("out", "to_x", "to_scores", "to_matrices"):
            assert found[name] < 1e-10, (name, found)
        assert found["counts_alike"] == 1
        assert found["rows_sent"] == found["rows_away"]
        assert found["bytes_dispatch"] == found["rows_away"] * 6 * 8


def test_rows_in_few_bits_are_near_and_weigh_less() -> None:
    for found in run_ranks(one_layer, 2, 3, "int8"):
        assert 1e-6 < found["out"] < 0.2, found
        assert found["bytes_dispatch"] == found["rows_away"] * (6 + 2)


def test_one_rank_keeps_torchtitans_own_dispatch() -> None:
    dispatcher = LuffyTokenDispatcher.Config(num_experts=4, top_k=2).build()
    dispatcher.wire_meshes(ep_mesh=None)
    x, scores, ids = torch.randn(3, 5), torch.ones(3, 2), torch.tensor([[0, 1], [1, 3], [3, 0]])
    rows, counts, told = dispatcher.dispatch(x, scores, ids, torch.bincount(ids.flatten(), minlength=4))
    assert rows.shape == (6, 5) and counts.tolist() == [2, 2, 0, 2]
    assert torch.allclose(dispatcher.combine(rows, told, x), 2 * x)


def test_what_is_no_plain_all_to_all_is_refused_by_name() -> None:
    with pytest.raises(UserError, match=r"TorchAOTokenDispatcher.*standard"):
        luffy.titan.exchange(TorchAOTokenDispatcher.Config(num_experts=4, top_k=2, pad_multiple=16))
    with pytest.raises(UserError, match="DeepEPTokenDispatcher"):
        luffy.titan.exchange(DeepEPTokenDispatcher.Config(num_experts=4, top_k=2))
    plain = AllToAllTokenDispatcher.Config(num_experts=4, top_k=2)
    with pytest.raises(UserError, match="--wire int3"):
        luffy.titan.exchange(plain, wire="int3")
    made = luffy.titan.exchange(plain, wire="int8")
    assert (type(made), made.num_experts, made.wire) == (LuffyTokenDispatcher.Config, 4, "int8")


def test_seats_without_an_exchange_are_refused() -> None:
    from examples.torchtitan_luffy import BytesLoader

    loader = luffy.titan.seats(BytesLoader.Config(), refresh=2).build(
        dp_world_size=1, dp_rank=0, seq_len=8, local_batch_size=2
    )
    with pytest.raises(UserError, match=r"luffy\.titan\.exchange and --parallelism\.expert_parallel_degree"):
        next(iter(loader))
    with pytest.raises(UserError, match="refresh=0"):
        luffy.titan.seats(BytesLoader.Config(), refresh=0)
    with pytest.raises(UserError, match=r"luffy\.titan\.exchange"):
        luffy.titan.metrics()
