"""Matrix products by group: rows sorted by group, each group with a matrix of its own.

On a GPU, in 16 bits, `F.grouped_mm` multiplies all groups in one kernel without a host round trip; elsewhere one matrix
product a group does. Matrices may lie transposed in memory. autograd knows the way back of the first alone.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.kernels.sort import Pairs


def one_kernel(x: Tensor) -> bool:
    """Whether one kernel multiplies all groups of x [P, ..]."""
    return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] > 0


def grouped_product(x: Tensor, weight: Tensor, pairs: Pairs) -> Tensor:
    """x [P, in] in the order of pairs, weight [n, in, out] of x's dtype -> [P, out]; nothing behind the last group."""
    if one_kernel(x):
        return F.grouped_mm(x, weight, offs=pairs.ends)
    parts = x.split([*pairs.sizes, x.shape[0] - sum(pairs.sizes)])
    rest = x.new_zeros(parts[-1].shape[0], weight.shape[2])
    return torch.cat([*(g @ w for g, w in zip(parts[:-1], weight.unbind(0), strict=True)), rest])


def grouped_outer(a: Tensor, b: Tensor, pairs: Pairs, like: Tensor) -> Tensor:
    """a [P, in], b [P, out] -> [n, in, out], a^T b of each group, zeros for an empty one; lies in memory as `like`."""
    if like.stride(2) != 1:
        return grouped_outer(b, a, pairs, like.transpose(1, 2)).transpose(1, 2)
    if one_kernel(a):
        return F.grouped_mm(a.t(), b, offs=pairs.ends)
    out = a.new_empty(len(pairs.sizes), a.shape[1], b.shape[1])
    for i, (x, y) in enumerate(zip(_parts(a, pairs), _parts(b, pairs), strict=True)):
        torch.mm(x.t(), y, out=out[i])
    return out


def group_sums(x: Tensor, pairs: Pairs) -> Tensor:
    """x [P, D] -> [n, D], the sum over the rows of each group.

    A product with rows of ones: adding thousands of rows into few would be one atomic addition after the other.
    """
    if one_kernel(x):
        ones = x.new_ones(x.shape[0], 16)  # as many columns as the kernel wants at least; one would do
        return F.grouped_mm(ones.t(), x, offs=pairs.ends)[:, 0]
    return torch.stack([part.sum(0) for part in _parts(x, pairs)])


def add_bias(x: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    """x [P, D] plus its group's row of bias [n, D]."""
    return x if bias is None else _AddBias.apply(x, bias, pairs)


class _AddBias(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, bias: Tensor, pairs: Pairs) -> Tensor:
        ctx.pairs, ctx.dtype = pairs, bias.dtype
        return x + bias.to(x.dtype).index_select(0, pairs.group)

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, group_sums(grad.contiguous(), ctx.pairs).to(ctx.dtype), None


def _parts(x: Tensor, pairs: Pairs) -> list[Tensor]:
    return list(x[: sum(pairs.sizes)].split(pairs.sizes))
