"""Rows picked by index, and rows added up again: each is the other's backward pass.

    gather_rows   out[i] = x[index[i]]                             tokens into copies, rows into pairs
    sum_rows      out[r] = addends[r] + sum_k rows[place[r, k]]    answers into rows, partial sums into the stream

`index` [P] says which row each place takes, `place` [R, K] at which places each row stands (-1: at none); one follows
from the other (luffy.kernels.sort). A sum is gathered by place, in float32 at least, and rounded once: with no atomic
additions it repeats itself to the bit. (`index_select`'s own backward pass adds atomically.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference serves
    triton = None


def gather_rows(x: Tensor, index: Tensor, place: Tensor) -> Tensor:
    """x [R, D], index int [P], place int [R, K] -> x[index], [P, D]."""
    return _Gather.apply(x, index, place)


def sum_rows(rows: Tensor, index: Tensor, place: Tensor, *addends: Tensor | None) -> Tensor:
    """rows [P, D], index int [P], place int [R, K], up to two addends [R, D] -> [R, D] of rows' dtype."""
    return _Sum.apply(rows, index, place, *addends)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, index: Tensor, place: Tensor) -> Tensor:
        ctx.index, ctx.place = index, place
        return pick(x, index)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        return add_up(grad, ctx.index, ctx.place), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, place: Tensor, *addends: Tensor | None) -> Tensor:
        ctx.index, ctx.dtypes = index, [None if a is None else a.dtype for a in addends]
        return add_up(rows, index, place, *addends)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        to_rows = pick(grad, ctx.index) if ctx.needs_input_grad[0] else None
        return to_rows, None, None, *(None if d is None else grad.to(d) for d in ctx.dtypes)


def uses_kernel(x: Tensor, kernel: bool | None) -> bool:
    """Whether a Triton kernel works on x: on a GPU, unless forced or in float64."""
    return (triton is not None and x.is_cuda and x.dtype != torch.float64) if kernel is None else kernel


def pick(x: Tensor, index: Tensor, kernel: bool | None = None) -> Tensor:
    """x [R, D], index int [P] -> [P, D]; without gradient. kernel: force the Triton kernel or the reference."""
    if not uses_kernel(x, kernel) or not index.numel() or not x.numel():
        return x.index_select(0, index)
    x = x if x.stride(1) == 1 else x.contiguous()
    P, D = index.shape[0], x.shape[1]
    out = torch.empty(P, D, dtype=x.dtype, device=x.device)
    run: Any = _pick[(triton.cdiv(P, 4), triton.cdiv(D, _width(D)))]
    run(x, index, out, P, D, x.stride(0), ROWS=4, BLOCK=_width(D), num_warps=4)
    return out


def add_up(rows: Tensor, index: Tensor, place: Tensor, *addends: Tensor | None, kernel: bool | None = None) -> Tensor:
    """rows [P, D], place int [R, K] -> [R, D]; without gradient. index: as place, for the reference."""
    known = [a.contiguous() for a in addends if a is not None]
    if len(known) > 2:
        raise ValueError(f"{len(known)} addends: two at most")
    (R, K), D = place.shape, rows.shape[1]
    if not uses_kernel(rows, kernel) or not R or not D:
        wide = torch.promote_types(rows.dtype, torch.float32)
        served = index.shape[0] if K == 0 or index.shape[0] < R * K else int((place >= 0).sum())
        total = rows.new_zeros(R, D, dtype=wide)
        for a in known:
            total += a
        return total.index_add_(0, index[:served], rows[:served].to(wide)).to(rows.dtype)
    out = torch.empty(R, D, dtype=rows.dtype, device=rows.device)
    a, b = (*known, rows, rows)[:2]
    run: Any = _add_up[(R, triton.cdiv(D, _width(D)))]
    run(
        rows.contiguous(), place.contiguous(), a, b, out, D, K=K, ADDENDS=len(known), BLOCK=_width(D),
        num_warps=max(1, _width(D) // 256),
    )  # fmt: skip
    return out


def _width(size: int) -> int:
    """Values of a row that one program looks at."""
    return min(1024, max(32, triton.next_power_of_2(size)))


if triton is not None:

    @triton.jit(do_not_specialize=["num"])
    def _pick(x, index, out, num, D, stride, ROWS: tl.constexpr, BLOCK: tl.constexpr):
        i = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        source = tl.load(index + i, mask=i < num, other=0).to(tl.int64)
        here = (i < num)[:, None] & (d < D)[None, :]
        value = tl.load(x + source[:, None] * stride + d[None, :], mask=here, other=0.0)
        tl.store(out + i.to(tl.int64)[:, None] * D + d[None, :], value, mask=here)

    @triton.jit
    def _add_up(rows, place, a, b, out, D, K: tl.constexpr, ADDENDS: tl.constexpr, BLOCK: tl.constexpr):
        r = tl.program_id(0).to(tl.int64)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        inside = d < D
        total = tl.zeros((BLOCK,), dtype=tl.float32)
        if ADDENDS > 0:
            total += tl.load(a + r * D + d, mask=inside, other=0.0).to(tl.float32)
        if ADDENDS > 1:
            total += tl.load(b + r * D + d, mask=inside, other=0.0).to(tl.float32)
        for k in tl.static_range(K):
            p = tl.load(place + r * K + k).to(tl.int64)
            total += tl.load(rows + p * D + d, mask=tl.where(inside, p, -1) >= 0, other=0.0).to(tl.float32)
        tl.store(out + r * D + d, total.to(out.dtype.element_ty), mask=inside)
