"""luffy.metrics: plain numbers that agree with what was sent, for own models and for parallelized ones."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import luffy
from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf import parallelize
from luffy.testing import run_ranks
from tests.hf.tiny import tiny_config, tiny_model

WIDTH = 8


def told(rank: int) -> None:
    mesh = build_mesh(torch.device("cpu"))
    first = luffy.MoEBlock(WIDTH, 12, 4, top_k=1, mesh=mesh)
    # One that shares the runtime, one that has its own, of the same number.
    model = nn.Sequential(first, luffy.MoEBlock(WIDTH, 12, 4, mesh=mesh, layer=1, runtime=first.runtime),
                          luffy.MoEBlock(WIDTH, 12, 4, mesh=mesh)).double()  # fmt: skip
    generator = torch.Generator().manual_seed(rank)
    x = torch.randn(3, 5, WIDTH, generator=generator, dtype=torch.float64)
    model(x).sum().backward()
    found = luffy.metrics(model)
    assert all(type(v) is float for v in found.values())
    if mesh.world_size == 1:
        assert found["bytes_sent"] == found["rows_sent"] == 0
        assert found["rows_home"] == found["busiest_rank"] == found["expert_rank_load"] == 1
    else:
        assert 0 < found["rows_home"] < 1 <= found["busiest_rank"] and 1 <= found["expert_rank_load"] <= 2
        assert found["rows_sent"] > 0 and found["bytes_dispatch"] == found["rows_sent"] * WIDTH * 8
        assert found["bytes_dispatch_backward"] == found["bytes_combine"]  # of the rows of others
        assert found["bytes_sent"] == sum(
            v for n, v in found.items() if n.startswith("bytes_") and n not in ("bytes_sent", "bytes_between_nodes")
        )
        assert found["bytes_between_nodes"] == 0
    again = luffy.metrics(model)
    assert again["bytes_sent"] == again["rows_sent"] == 0 and again["rows_home"] == 1
    model(x)
    once = luffy.metrics(model)
    assert once["rows_sent"] == found["rows_sent"] and once["bytes_combine_backward"] == 0
    with pytest.raises(UserError, match="Linear holds no"):
        luffy.metrics(nn.Linear(2, 2))


def told_of_parallelized(rank: int) -> None:
    mesh = build_mesh(torch.device("cpu"))
    model = parallelize(tiny_model(tiny_config("mixtral")), mesh)
    model.eval()(model.batch(torch.arange(12).view(2, 6)))
    assert luffy.metrics(model)["rows_sent"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_numbers_for_a_logger(ranks: int) -> None:
    run_ranks(told, ranks)


def test_numbers_of_a_parallelized_model() -> None:
    run_ranks(told_of_parallelized, 2)
