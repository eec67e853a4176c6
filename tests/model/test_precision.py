"""bfloat16 streams over float32 weights stay close to float32: a check of casts, not of exactness."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch

from luffy.testing import gather_full, run_ranks

from .cases import TINY_PRESETS, Case, build, run_step, shrunk

# bfloat16 keeps 8 bits, a relative error of 0.4% in each of the numbers that add up to a loss, and a near tie between
# two experts may fall the other way.
LOSS_TOLERANCE = 0.005
COSINE_AT_LEAST = 0.995


def loss_and_gradients(rank: int, case: Case) -> Any:
    model, comm = build(case)
    loss = float(run_step(model, comm, case, case.data()[0])[0])
    assert all(p.dtype == torch.float32 for p in model.parameters())
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())
    gradients = gather_full(model, "grad")
    return loss, torch.cat([g.flatten() for g in gradients.values()]).numpy()


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_bfloat16_is_close_to_float32(preset: str) -> None:
    narrow = Case(shrunk(preset, num_shared_experts=1), world=2, dtype=torch.bfloat16, padded=True)
    wide = dataclasses.replace(narrow, dtype=torch.float32)
    (loss16, g16), (loss32, g32) = (run_ranks(loss_and_gradients, 2, case)[0] for case in (narrow, wide))
    assert loss16 != loss32, "the stream was not in bfloat16"
    assert abs(loss16 - loss32) < LOSS_TOLERANCE * abs(loss32)
    cosine = torch.cosine_similarity(torch.from_numpy(g16), torch.from_numpy(g32), dim=0)
    assert cosine > COSINE_AT_LEAST
