"""luffy.MoEBlock: the same function at every number of ranks, and the script of docs/own_model.md as it is printed."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luffy
from luffy.comm import build_mesh
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.errors import UserError
from luffy.testing import gather_full, run_ranks

DOC = Path(__file__).resolve().parents[2] / "docs" / "own_model.md"
LENGTH, WIDTH = 5, 16


def inputs(num_rows: int) -> torch.Tensor:
    return torch.randn(num_rows, LENGTH, WIDTH, generator=torch.Generator().manual_seed(3), dtype=torch.float64)


def one_block(rank: int, rows: list[int]) -> dict[str, Any]:
    """Answers, the summed loss with its auxiliary parts, and all gradients, with `rows[r]` sequences on rank r."""
    mesh, start = build_mesh(torch.device("cpu")), sum(rows[:rank])
    block = luffy.MoEBlock(WIDTH, 24, 4, mesh=mesh, balance_loss=0.3, z_loss=0.2, locality_loss=0.1,
                           num_shared_experts=1, seed=7).double()  # fmt: skip
    x = inputs(sum(rows))[start : start + rows[rank]]
    with pytest.raises(UserError, match="follows a forward pass"):
        block.aux_loss()
    y = block(x)
    loss = y.square().sum() + 50 * block.aux_loss()
    loss.backward()
    comm = block.runtime.comm
    total = float(comm.all_reduce(loss.detach().clone()))

    # The same rows as a TokenBatch, under a recipe that may move them: they end somewhere with the same values.
    moving = luffy.MoEBlock(WIDTH, 24, 4, mesh=mesh, recipe="netmoe", num_shared_experts=1, seed=7).double()
    with pytest.raises(UserError, match="moves sequences"):
        moving(x)
    home = np.repeat(np.arange(len(rows)), rows)
    layout = Layout(SequenceTable(np.full(sum(rows), LENGTH), home), mesh.ep_rank, x.device)
    batch = moving(TokenBatch(x.reshape(-1, WIDTH), layout))
    found = torch.zeros(sum(rows) * LENGTH, WIDTH, dtype=torch.float64)
    found[batch.layout.global_token] = batch.hidden.detach()
    comm.all_reduce(found)
    assert torch.allclose(found.view(-1, LENGTH, WIDTH)[start : start + rows[rank]], y.detach(), atol=1e-12)
    return {
        "y": y.detach().numpy(),
        "loss": total,
        "gradients": {n: g.numpy() for n, g in gather_full(block, "grad").items()},
    }


def test_the_same_on_one_rank_and_on_three_one_of_them_empty() -> None:
    alone = run_ranks(one_block, 1, [5])[0]
    together = run_ranks(one_block, 2, [5, 0])
    assert np.allclose(np.concatenate([r["y"] for r in together]), alone["y"], atol=1e-12)
    uneven = run_ranks(one_block, 4, [1, 0, 3, 1])
    assert np.allclose(np.concatenate([r["y"] for r in uneven]), alone["y"], atol=1e-12)
    for result in (together[0], uneven[0]):
        assert result["loss"] == pytest.approx(alone["loss"], rel=1e-12)
        assert result["gradients"].keys() == alone["gradients"].keys()
        for name, gradient in alone["gradients"].items():
            assert np.abs(gradient).max() > 0
            assert np.allclose(result["gradients"][name], gradient, rtol=1e-9, atol=1e-11), name


def run_script(rank: int, source: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        exec(compile(source, str(DOC), "exec"), {"__name__": "__main__"})
    return out.getvalue()


def test_the_script_of_the_documentation_trains() -> None:
    match = re.search(r"```python\n(import inspect.*?)```", DOC.read_text(encoding="utf-8"), re.DOTALL)
    assert match is not None
    printed = run_ranks(run_script, 2, match[1])
    losses = [float(x) for x in re.findall(r"loss ([0-9.]+)", printed[0])]
    assert len(losses) == 3 and not printed[1]
    assert losses[-1] < losses[0] - 0.1, "from about ln 256 = 5.5 to what its letters alone tell"
    assert all(float(x) > 0 for x in re.findall(r"([0-9.]+) MB sent", printed[0]))
