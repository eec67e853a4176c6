"""Every recipe through every door: `MoEBlock` on tensors and on batches, `parallelize`, placements of experts.

What is not refused in one line computes what one rank computes alone.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

import luffy
from luffy.comm import build_mesh
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.errors import UserError
from luffy.recipes import RECIPES
from luffy.testing import gather_full, run_ranks
from luffy.train.rehoming import move_experts

LENGTH, WIDTH, ROWS = 6, 16, 6
# What rounds or condenses: on, it is another function; in evaluation condensation is off.
LOSSY = {"luffy_max": 0.3, "luffy_paper": None, "lsh_moe": None, "lsh_moe_causal": None}


def inputs() -> torch.Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def through_the_door(block: Any, x: torch.Tensor, rows: slice, door: str, mesh: Any) -> torch.Tensor:
    """[rows, LENGTH, WIDTH] of this rank's sequences."""
    if door == "tensors":
        return block(x[rows])
    home = np.repeat(np.arange(mesh.ep_size), ROWS // mesh.ep_size)
    layout = Layout(SequenceTable(np.full(ROWS, LENGTH), home), mesh.ep_rank, x.device)
    batch = block(TokenBatch(x[rows].reshape(-1, WIDTH), layout))
    out = torch.zeros(ROWS * LENGTH, WIDTH, dtype=torch.float64)
    out = out.index_copy(0, batch.layout.global_token, batch.hidden)
    # Wherever they ended: each rank gives its rows, and each takes those that it began with.
    return out.view(ROWS, LENGTH, WIDTH)


def every_recipe(rank: int, moved: bool) -> dict[str, Any]:
    mesh, world = build_mesh(torch.device("cpu")), torch.distributed.get_world_size()
    found: dict[str, Any] = {}
    rows = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    for name in RECIPES:
        for door in ("tensors", "batch"):
            try:
                block = luffy.MoEBlock(WIDTH, 24, 8, 2, mesh=mesh, recipe=name, num_shared_experts=1, seed=7).double()
                if block.runtime.residency is not None:
                    block.runtime.residency.flops_per_second = 1e6  # slow experts: shadows pay
                if moved:
                    owner = np.random.default_rng(1).permutation(np.arange(8) * world // 8)
                    move_experts(block.moe, torch.optim.AdamW(block.parameters()), owner, block.runtime.comm)
                if LOSSY.get(name, 0.0) is None:
                    block.eval()
                for _ in range(2):  # a second pass finds what the first left behind
                    block.zero_grad()
                    y = through_the_door(block, inputs(), rows, door, mesh)
                    y.square().sum().backward()
                comm = block.runtime.comm
                whole = y.detach()
                if door == "tensors":
                    whole = torch.zeros(ROWS, LENGTH, WIDTH, dtype=torch.float64)
                    whole[rows] = y.detach()
                answer = comm.all_reduce(whole.clone()).numpy()
                found[f"{name}/{door}"] = answer, {n: g.numpy() for n, g in gather_full(block, "grad").items()}
            except UserError as error:
                found[f"{name}/{door}"] = str(error)
    return found


@pytest.mark.parametrize(("world", "moved"), [(2, False), (2, True)])
def test_each_recipe_through_each_door_is_exact_or_refused(world: int, moved: bool) -> None:
    alone = run_ranks(every_recipe, 1, False)[0]
    answer, gradients = alone["vanilla/tensors"]
    refused = {}
    for name, got in run_ranks(every_recipe, world, moved)[0].items():
        if isinstance(got, str):
            assert "\n" not in got and "--recipe" in got, name
            refused[name] = got
            continue
        tolerance = LOSSY.get(name.split("/")[0]) or 1e-10
        assert np.abs(got[0] - answer).max() < tolerance * np.abs(answer).max(), name
        for parameter, gradient in gradients.items():
            error = np.abs(got[1][parameter] - gradient).max() / np.abs(gradient).max()
            assert error < (tolerance if tolerance < 0.1 else 2.0), (name, parameter, error)
    assert set(refused) == {"auto/tensors", "auto/batch", "luffy_paper/tensors", "netmoe/tensors"}
