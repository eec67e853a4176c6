"""Weights are cast once a step, and never stale."""

import pytest
import torch

from luffy.model.casting import CastOnce


def test_a_cast_is_kept_until_the_weight_changes():
    cast, w = CastOnce(), torch.nn.Parameter(torch.ones(3))
    first = cast("w", w, torch.bfloat16)
    assert cast("w", w, torch.bfloat16).data_ptr() == first.data_ptr()
    with torch.no_grad():
        w.mul_(2)
    assert cast("w", w, torch.bfloat16).tolist() == [2.0] * 3
    w.data = torch.full((3,), 5.0)
    assert cast("w", w, torch.bfloat16).tolist() == [5.0] * 3
    assert cast("w", w, torch.float32) is w
    cast("w", w, torch.bfloat16).sum().backward()
    assert w.grad is not None and w.grad.dtype == torch.float32 and w.grad.tolist() == [1.0] * 3


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_no_optimizer_leaves_a_stale_cast(options):
    """PyTorch's fused AdamW changes weights without counting up their version."""
    cast, w = CastOnce(), torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([w], lr=0.5, **options)
    cast("w", w, torch.bfloat16).sum().backward()
    optimizer.step()
    assert torch.equal(cast("w", w, torch.bfloat16), w.detach().bfloat16()) and w[0] < 0.9


def test_an_optimizer_of_another_make_leaves_none_either():
    """It writes to `p.data`, which counts up no version, after a backward pass."""
    cast, w = CastOnce(), torch.nn.Parameter(torch.ones(3))
    cast("w", w, torch.bfloat16).sum().backward()
    w.data.sub_(0.5)
    assert cast("w", w, torch.bfloat16).tolist() == [0.5] * 3
