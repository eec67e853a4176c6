"""A linear router in few launches: logits, scores, the k best experts and their weights, forward and backward.

The product is as exact as one in float32 and runs on the matrix units: a float32 weight is the sum of three bfloat16
numbers to 24 bits, and rows in bfloat16 are what they are, so three exact products, added in float32, give the logits.
One kernel then adds the three, takes scores and chooses; one gives the logits' gradient from that of all its outputs.

For rows in bfloat16 on a GPU only: elsewhere luffy.model.router says the same in torch. `choose` and `choose_backward`
can be held to their references anywhere.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference serves
    triton = None

MOST_EXPERTS = 1024


class Choice(NamedTuple):
    """logits, scores float32 [T, E], ids int64 [T, K] from the best on, weights float32 [T, K]."""

    logits: Tensor
    scores: Tensor
    ids: Tensor
    weights: Tensor


def serves(x: Tensor, weight: Tensor) -> bool:
    """Whether `route` can be called with these."""
    narrow = x.is_cuda and x.dtype == torch.bfloat16 and weight.dtype in (torch.bfloat16, torch.float32)
    return triton is not None and narrow and weight.shape[0] <= MOST_EXPERTS and x.shape[0] > 0


def route(x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool) -> Choice:
    """x [T, D] bfloat16, weight [E, D] -> Choice. bias [E]: added to scores for the choice only. score: "softmax" or
    "sigmoid". normalize: weights are divided by their sum."""
    return Choice(*_Route.apply(x, weight, bias, top_k, score, normalize))


class _Route(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool):
        pieces = split(weight)  # [4, E, D]
        logits = torch.mm(x, pieces[:3].flatten(0, 1).t(), out_dtype=torch.float32)
        made = choose(logits, bias, top_k, score, normalize)
        ctx.save_for_backward(x, weight, pieces, made.scores, made.ids)
        ctx.score, ctx.normalize = score, normalize
        ctx.mark_non_differentiable(made.ids)
        ctx.set_materialize_grads(False)
        return tuple(made)

    @staticmethod
    @once_differentiable
    def backward(ctx, to_logits: Tensor | None, to_scores: Tensor | None, _: None, to_weights: Tensor | None):
        x, weight, pieces, scores, ids = ctx.saved_tensors
        if to_logits is None and to_scores is None and to_weights is None:
            return (None,) * 6
        E = weight.shape[0]
        # [high, high, middle] of the gradient, beside [high; middle; high] of the weight: products to 16 bits.
        grad = choose_backward(scores, ids, to_logits, to_scores, to_weights, ctx.score, ctx.normalize)
        to_x = to_weight = None
        if ctx.needs_input_grad[0]:
            to_x = grad @ pieces[1:].flatten(0, 1)
        if ctx.needs_input_grad[1]:
            both = torch.mm(grad[:, E:].t(), x, out_dtype=torch.float32)
            to_weight = both.view(2, E, -1).sum(0).to(weight.dtype)
        return to_x, to_weight, None, None, None, None


def split(weight: Tensor) -> Tensor:
    """weight [E, D] -> bfloat16 [4, E, D]: low, high, middle, high; the first three add up to it, to 24 bits."""
    out = torch.empty(4, *weight.shape, dtype=torch.bfloat16, device=weight.device)
    run: Any = _split[(triton.cdiv(weight.numel(), 1024),)]
    run(weight.contiguous(), out, weight.numel(), BLOCK=1024, num_warps=4)
    return out


def choose(pieces: Tensor, bias: Tensor | None, top_k: int, score: str, normalize: bool) -> Choice:
    """pieces float32 [T, 3 E], low, high and middle parts, which add up to logits."""
    T, E = pieces.shape[0], pieces.shape[1] // 3
    logits, scores = torch.empty(2, T, E, device=pieces.device).unbind(0)
    ids = torch.empty(T, top_k, dtype=torch.int64, device=pieces.device)
    weights = torch.empty(T, top_k, device=pieces.device)
    run: Any = _choose[(triton.cdiv(T, _ROWS),)]
    run(
        pieces, pieces if bias is None else bias, logits, scores, ids, weights, T, E,
        BIAS=bias is not None, SOFTMAX=score == "softmax", NORMALIZE=normalize, K=top_k, ROWS=_ROWS,
        COLUMNS=triton.next_power_of_2(E), num_warps=4,
    )  # fmt: skip
    return Choice(logits, scores, ids, weights)


def choose_backward(
    scores: Tensor,
    ids: Tensor,
    to_logits: Tensor | None,
    to_scores: Tensor | None,
    to_weights: Tensor | None,
    score: str,
    normalize: bool,
) -> Tensor:
    """Gradients of Choice's members -> that of the logits in pieces, bfloat16 [T, 3 E]: high, high, middle."""
    (T, E), K = scores.shape, ids.shape[1]
    out = torch.empty(T, 3 * E, dtype=torch.bfloat16, device=scores.device)
    given = [None if g is None else g.contiguous() for g in (to_logits, to_scores, to_weights)]
    run: Any = _choose_backward[(triton.cdiv(T, _ROWS),)]
    run(
        scores, ids, *(scores if g is None else g for g in given), out, T, E,
        LOGITS=given[0] is not None, SCORES=given[1] is not None, WEIGHTS=given[2] is not None,
        SOFTMAX=score == "softmax", NORMALIZE=normalize, K=K, ROWS=_ROWS,
        COLUMNS=triton.next_power_of_2(E), num_warps=4,
    )  # fmt: skip
    return out


_ROWS = 4


if triton is not None:

    @triton.jit
    def _split(weight, out, size, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        rest = tl.load(weight + at, mask=at < size, other=0.0).to(tl.float32)
        high = rest.to(tl.bfloat16)
        rest -= high.to(tl.float32)
        middle = rest.to(tl.bfloat16)
        low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
        tl.store(out + at, low, mask=at < size)
        tl.store(out + size + at, high, mask=at < size)
        tl.store(out + 2 * size + at, middle, mask=at < size)
        tl.store(out + 3 * size + at, high, mask=at < size)

    @triton.jit(do_not_specialize=["T"])
    def _choose(
        pieces, bias, logits, scores, ids, weights, T, E,
        BIAS: tl.constexpr, SOFTMAX: tl.constexpr, NORMALIZE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr,
        COLUMNS: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        e = tl.arange(0, COLUMNS)
        here = (t < T)[:, None] & (e < E)[None, :]
        at = t.to(tl.int64)[:, None] * (3 * E) + e[None, :]
        x = tl.load(pieces + at, mask=here, other=0.0) + tl.load(pieces + at + 2 * E, mask=here, other=0.0)
        x += tl.load(pieces + at + E, mask=here, other=0.0)
        if SOFTMAX:
            x = tl.where((e < E)[None, :], x, float("-inf"))
            y = tl.exp(x - tl.max(x, axis=1)[:, None])
            y = y / tl.sum(y, axis=1)[:, None]
        else:
            y = 1.0 / (1.0 + tl.exp(-x))
        out = t.to(tl.int64)[:, None] * E + e[None, :]
        tl.store(logits + out, x, mask=here)
        tl.store(scores + out, y, mask=here)
        best = y
        if BIAS:
            best = y + tl.load(bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
        best = tl.where((e < E)[None, :], best, float("-inf"))
        total = tl.zeros((ROWS,), dtype=tl.float32)
        for k in tl.static_range(K):
            first = tl.argmax(best, axis=1)
            taken = e[None, :] == first[:, None]
            w = tl.sum(tl.where(taken, y, 0.0), axis=1)
            total += w
            tl.store(ids + t.to(tl.int64) * K + k, first.to(tl.int64), mask=t < T)
            tl.store(weights + t.to(tl.int64) * K + k, w, mask=t < T)
            best = tl.where(taken, float("-inf"), best)
        if NORMALIZE:
            for k in tl.static_range(K):
                w = tl.load(weights + t.to(tl.int64) * K + k, mask=t < T, other=0.0)
                tl.store(weights + t.to(tl.int64) * K + k, w / tl.maximum(total, 1e-20), mask=t < T)

    @triton.jit(do_not_specialize=["T"])
    def _choose_backward(
        scores, ids, to_logits, to_scores, to_weights, out, T, E,
        LOGITS: tl.constexpr, SCORES: tl.constexpr, WEIGHTS: tl.constexpr, SOFTMAX: tl.constexpr,
        NORMALIZE: tl.constexpr, K: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
    ):  # fmt: skip
        t = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
        e = tl.arange(0, COLUMNS)
        here = (t < T)[:, None] & (e < E)[None, :]
        row = t.to(tl.int64)
        at = row[:, None] * E + e[None, :]
        y = tl.load(scores + at, mask=here, other=0.0)
        grad = tl.zeros((ROWS, COLUMNS), dtype=tl.float32)  # of the scores
        if SCORES:
            grad += tl.load(to_scores + at, mask=here, other=0.0)
        if WEIGHTS:
            total = tl.zeros((ROWS,), dtype=tl.float32)
            dot = tl.zeros((ROWS,), dtype=tl.float32)
            if NORMALIZE:  # w_k = y_k / s: its gradient is (g_k - sum_j g_j w_j) / s
                for k in tl.static_range(K):
                    chosen = tl.load(ids + row * K + k, mask=t < T, other=0).to(tl.int32)
                    w = tl.sum(tl.where(e[None, :] == chosen[:, None], y, 0.0), axis=1)
                    total += w
                    dot += w * tl.load(to_weights + row * K + k, mask=t < T, other=0.0)
                total = tl.where(t < T, total, 1.0)
                # Weights of a sum so small that it was raised to 1e-20 are y_k / 1e-20.
                dot = tl.where(total > 1e-20, dot / tl.maximum(total, 1e-20), 0.0)
            for k in tl.static_range(K):
                chosen = tl.load(ids + row * K + k, mask=t < T, other=0).to(tl.int32)
                g = tl.load(to_weights + row * K + k, mask=t < T, other=0.0)
                if NORMALIZE:
                    g = (g - dot) / tl.maximum(total, 1e-20)
                grad += tl.where(e[None, :] == chosen[:, None], g[:, None], 0.0)
        if SOFTMAX:
            grad = y * (grad - tl.sum(grad * y, axis=1)[:, None])
        else:
            grad = grad * y * (1.0 - y)
        if LOGITS:
            grad += tl.load(to_logits + at, mask=here, other=0.0)
        high = grad.to(tl.bfloat16)
        middle = (grad - high.to(tl.float32)).to(tl.bfloat16)
        at = row[:, None] * (3 * E) + e[None, :]
        tl.store(out + at, high, mask=here)
        tl.store(out + at + E, high, mask=here)
        tl.store(out + at + 2 * E, middle, mask=here)
