"""An expert's activation and its choice's weight in one pass, forward and backward.

    out[p] = weights[flat[p]] * f(x[p] + bias[group[p]])

Weighting what lies between an expert's two products costs nothing, and is the same as weighting its answer, since the
second product is linear. Nothing is kept: the backward pass computes f again, and gives the weighted output (which the
gradient of the second product's matrix needs) and the gradients of x and of the weights in one go.

f: "swiglu", gate then value (arXiv 2002.05202); "gelu", in its tanh form; or any function [P, width] -> [P, F], which
then is differentiated by autograd. Everything in float32 at least, rounded once.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.kernels.rows import uses_kernel
from luffy.kernels.sort import Pairs

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference serves
    triton = None

Activation = str | Callable[[Tensor], Tensor]


def activate(x: Tensor, activation: Activation) -> Tensor:
    """ "gelu": [.., F] -> [.., F]. "swiglu": [.., 2F] (gate, then value) -> [.., F] (arXiv 2002.05202)."""
    if callable(activation):
        return activation(x)
    if activation == "swiglu":
        gate, value = x.chunk(2, dim=-1)
        return F.silu(gate) * value
    return F.gelu(x, approximate="tanh")


def activate_weighted(
    x: Tensor, bias: Tensor | None, weights: Tensor, pairs: Pairs, activation: Activation, kernel: bool | None = None
) -> Tensor:
    """x [P, width], bias [n, width], weights [R, K] -> [P, F]; without gradient."""
    if isinstance(activation, str) and uses_kernel(x, kernel) and x.shape[0]:
        P, size = x.shape[0], x.shape[1] // (2 if activation == "swiglu" else 1)
        out = torch.empty(P, size, dtype=x.dtype, device=x.device)
        run: Any = _forward[(triton.cdiv(P, _ROWS), triton.cdiv(size, _WIDTH))]
        run(
            x, x if bias is None else bias.contiguous(), pairs.group, weights.contiguous(), pairs.flat, out, P, size,
            BIAS=bias is not None, GATED=activation == "swiglu", ROWS=_ROWS, BLOCK=_WIDTH, num_warps=4,
        )  # fmt: skip
        return out
    wide = torch.promote_types(x.dtype, torch.float32)
    y = activate(_biased(x.to(wide), bias, pairs), activation)
    return (y * _by_pair(weights, pairs).to(wide)[:, None]).to(x.dtype)


def activate_weighted_backward(
    grad: Tensor,
    x: Tensor,
    bias: Tensor | None,
    weights: Tensor,
    pairs: Pairs,
    activation: Activation,
    kernel: bool | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """grad [P, F] of the output -> gradient of x [P, width], the output [P, F], gradient of weights [R, K].

    The gradient of the bias is that of x, summed by group. The kernel puts the first two in the place of x and grad,
    which are as large as anything in a layer; autograd is told, so that a second pass over x is refused.
    """
    P = x.shape[0]
    # Choices that nobody here serves have no gradient; where they are among the P, the kernel says so.
    whole = weights.numel() == P
    if isinstance(activation, str) and uses_kernel(x, kernel) and P:
        to_weights = torch.empty_like(weights) if whole else torch.zeros_like(weights)
        run: Any = _backward[(triton.cdiv(P, _ROWS),)]
        run(
            grad, x, x if bias is None else bias.contiguous(), pairs.group, weights.contiguous(), pairs.flat,
            pairs.ends, to_weights, P, grad.shape[1], len(pairs.ends),
            BIAS=bias is not None, GATED=activation == "swiglu", ROWS=_ROWS, BLOCK=_WIDTH, num_warps=4,
        )  # fmt: skip
        torch.autograd.graph.increment_version(x)
        torch.autograd.graph.increment_version(grad)
        return x, grad, to_weights
    wide = torch.promote_types(x.dtype, torch.float32)
    with torch.enable_grad():
        leaf = _biased(x.to(wide), bias, pairs).detach().requires_grad_()
        y = activate(leaf, activation)
    w, upstream = _by_pair(weights, pairs).to(wide)[:, None], grad.to(wide)
    (to_x,) = torch.autograd.grad(y, leaf, upstream * w)
    y = y.detach()
    to_weights = torch.zeros_like(weights)
    dots = (upstream * y).sum(1).to(weights.dtype)
    if whole:
        dots = torch.where(torch.arange(P, device=x.device) < pairs.ends[-1], dots, 0)
    to_weights.view(-1).index_copy_(0, pairs.flat.long(), dots)
    return to_x.to(x.dtype), (y * w).to(x.dtype), to_weights


def _biased(x: Tensor, bias: Tensor | None, pairs: Pairs) -> Tensor:
    return x if bias is None else x + bias.to(x.dtype).index_select(0, pairs.group)


def _by_pair(weights: Tensor, pairs: Pairs) -> Tensor:
    return weights.reshape(-1).index_select(0, pairs.flat)


_ROWS, _WIDTH = 4, 256  # what one program looks at: 16 bytes a thread


if triton is not None:

    @triton.jit
    def _load(x, bias, group, p, d, here, width, BIAS: tl.constexpr):
        value = tl.load(x + p.to(tl.int64)[:, None] * width + d[None, :], mask=here, other=0.0).to(tl.float32)
        if BIAS:
            at = bias + group.to(tl.int64)[:, None] * width + d[None, :]
            value += tl.load(at, mask=here, other=0.0).to(tl.float32)
        return value

    @triton.jit
    def _sigmoid(x):
        return 1.0 / (1.0 + tl.exp(-x))

    @triton.jit(do_not_specialize=["P"])
    def _forward(
        x, bias, group, weights, flat, out, P, size,
        BIAS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        d = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
        here = (p < P)[:, None] & (d < size)[None, :]
        g = p
        if BIAS:
            g = tl.load(group + p, mask=p < P, other=0)
        w = tl.load(weights + tl.load(flat + p, mask=p < P, other=0), mask=p < P, other=0.0).to(tl.float32)
        if GATED:
            gate = _load(x, bias, g, p, d, here, 2 * size, BIAS)
            value = _load(x, bias, g, p, d + size, here, 2 * size, BIAS)
            y = gate * _sigmoid(gate) * value
        else:
            value = _load(x, bias, g, p, d, here, size, BIAS)
            y = value * _sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
        at = p.to(tl.int64)[:, None] * size + d[None, :]
        tl.store(out + at, (y * w[:, None]).to(out.dtype.element_ty), mask=here)

    @triton.jit(do_not_specialize=["P", "n"])
    def _backward(
        grad, x, bias, group, weights, flat, ends, to_weights, P, size, n,
        BIAS: tl.constexpr, GATED: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    ):  # fmt: skip
        p = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        g = p
        if BIAS:
            g = tl.load(group + p, mask=p < P, other=0)
        name = tl.load(flat + p, mask=p < P, other=0)
        w = tl.load(weights + name, mask=p < P, other=0.0).to(tl.float32)[:, None]
        dot = tl.zeros((ROWS,), dtype=tl.float32)
        row = p.to(tl.int64)[:, None]
        for first in range(0, size, BLOCK):
            d = first + tl.arange(0, BLOCK)
            here = (p < P)[:, None] & (d < size)[None, :]
            at = row * size + d[None, :]
            up = tl.load(grad + at, mask=here, other=0.0).to(tl.float32)
            if GATED:
                gate = _load(x, bias, g, p, d, here, 2 * size, BIAS)
                value = _load(x, bias, g, p, d + size, here, 2 * size, BIAS)
                s = _sigmoid(gate)
                y = gate * s * value
                to_gate = up * w * value * s * (1.0 + gate * (1.0 - s))
                to_value = up * w * gate * s
                beside = row * (2 * size) + d[None, :]
                tl.store(x + beside, to_gate.to(x.dtype.element_ty), mask=here)
                tl.store(x + beside + size, to_value.to(x.dtype.element_ty), mask=here)
            else:
                value = _load(x, bias, g, p, d, here, size, BIAS)
                s = _sigmoid(1.5957691216057308 * (value + 0.044715 * value * value * value))
                y = value * s
                slope = s + y * (1.0 - s) * 1.5957691216057308 * (1.0 + 0.134145 * value * value)
                tl.store(x + at, (up * w * slope).to(x.dtype.element_ty), mask=here)
            dot += tl.sum(tl.where(here, up * y, 0.0), axis=1)
            tl.store(grad + at, (y * w).to(grad.dtype.element_ty), mask=here)
        dot = tl.where(p < tl.load(ends + n - 1), dot, 0.0)
        tl.store(to_weights + name, dot.to(to_weights.dtype.element_ty), mask=p < P)
