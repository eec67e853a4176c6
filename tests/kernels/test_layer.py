"""The kernels of a MoE layer (interpreted) against their references; what they compute, against plain autograd."""

import pytest
import torch

from luffy.config import ModelConfig
from luffy.kernels.activation import activate
from luffy.kernels.rows import gather_rows, sum_rows
from luffy.kernels.sort import sort_by_group
from luffy.model.experts import GroupedExperts

from .interpreted import interpret
from .layered import choices


@pytest.mark.slow
def test_the_kernels_agree_with_their_references_in_tritons_interpreter():
    assert "agree" in interpret("layered")


def test_gathering_and_adding_are_each_others_gradient():
    ids = choices(11, 4, 6, 0.3)
    pairs = sort_by_group(ids, 6, int((ids >= 0).sum()))
    x, a = (torch.randn(11, 5, dtype=torch.float64, requires_grad=True) for _ in range(2))
    assert torch.equal(gather_rows(x, pairs.row, pairs.place), x[pairs.row])
    torch.autograd.gradcheck(lambda x: gather_rows(x, pairs.row, pairs.place), x)
    rows = torch.randn(len(pairs.row), 5, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda rows, a: sum_rows(rows, pairs.row, pairs.place, a), (rows, a))
    expected = a.detach().clone()
    for p, r in enumerate(pairs.row):
        expected[r] += rows[p].detach()
    torch.testing.assert_close(sum_rows(rows, pairs.row, pairs.place, a), expected, rtol=1e-12, atol=1e-12)


def test_a_sum_of_bfloat16_rows_is_rounded_once():
    """256 + 1 is 256 in bfloat16: adding one by one would lose all but the first, and the residual too."""
    pairs = sort_by_group(torch.arange(8)[None], 8)
    rows = torch.ones(8, 1, dtype=torch.bfloat16)
    total = sum_rows(rows, pairs.row, pairs.place, torch.full((1, 1), 256.0, dtype=torch.bfloat16))
    assert total.dtype == torch.bfloat16 and total.item() == 264.0


@pytest.mark.parametrize("trimmed", [True, False])
@pytest.mark.parametrize("activation", ["swiglu", "gelu", "own"])
@pytest.mark.parametrize("bias", [True, False])
def test_experts_are_those_of_a_loop_with_all_gradients(trimmed, activation, bias):
    """Dropped choices, an expert without rows, a residual; known numbers of pairs and not."""
    torch.manual_seed(0)
    kind = "swiglu" if activation == "own" else activation
    config = ModelConfig(name="x", hidden_size=6, num_heads=1, expert_hidden_size=10, activation=kind, bias=bias)
    experts = GroupedExperts(config, 5).double()
    if activation == "own":
        experts.activation = lambda x: x[:, ::2].tanh() * x[:, 1::2]
    for p in experts.parameters():
        torch.nn.init.normal_(p)
    ids = choices(11, 3, 4, 0.3)  # the fifth expert is idle
    pairs = sort_by_group(ids, 5, int((ids >= 0).sum()) if trimmed else None)
    x, residual = (torch.randn(11, 6, dtype=torch.float64, requires_grad=True) for _ in range(2))
    weights = torch.rand(11, 3, dtype=torch.float64, requires_grad=True)
    got = experts(x, weights, pairs, residual=residual)
    rows = []
    for r in range(11):
        total = residual[r]
        for k in range(3):
            e = int(ids[r, k])
            if e >= 0:
                hidden = x[r] @ experts.w_in[e] + (experts.b_in[e] if bias else 0)
                answer = activate(hidden[None], experts.activation)[0] @ experts.w_out[e]
                total = total + weights[r, k] * (answer + (experts.b_out[e] if bias else 0))
        rows.append(total)
    want = torch.stack(rows)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    leaves = [x, residual, weights, *experts.parameters()]
    upstream = torch.randn_like(want)
    for a, b in zip(*(torch.autograd.grad(y, leaves, upstream) for y in (got, want)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
