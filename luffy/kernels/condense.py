"""The decision what to condense in three launches: groups, windows, cosines, choice, and what becomes of every copy.

Written with torch operations (luffy.exchange.condense, luffy.kernels.representatives) the decision is about a hundred
launches, each a few microseconds of a GPU and more of its host, whatever the number of copies. Here:

    _count    copies of each expert in each block of tokens; answers for copies that cannot be condensed
    _place    the table of windows (luffy.kernels.windows)
    _choose   a program a window: W x W cosines on the matrix units, representatives, answers

The cosines never leave the chip, so memory is linear in copies.

Rows are not scaled beforehand: the products of the rows as they are, divided by the lengths that stand on the diagonal.
Products of bfloat16 are exact in float32 and are summed in it, so cosines are those of the float32 path up to the order
of summation, about 1e-6, and twins are alike at any threshold up to there.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from luffy.kernels.windows import Answer, Question, find_windows

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the torch path serves
    triton = None


def available(x: Tensor, window: int) -> bool:
    """Whether the kernels decide for rows such as x [T, D]."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64 and window in (16, 32, 64, 128)


def decide(q: Question) -> Answer:
    """Decide for all copies of a layer."""
    table, answer = find_windows(q)
    choose(q, table, answer)
    return answer


def choose(
    q: Question, table: Tensor, answer: Answer, *, block: int = 64, num_warps: int = 0, stages: int = 3,
    registers: int | None = None,
) -> None:  # fmt: skip
    """Fill in the answers of all copies in windows. block: columns of x at once. registers: a limit for a thread."""
    x = q.x if q.x.stride(-1) == 1 else q.x.contiguous()
    if not len(table):
        return
    W = q.window
    launch: Any = _choose[(len(table),)]
    launch(
        x, table, answer.leader, answer.sent.view(torch.uint8), answer.shared.view(torch.uint8),
        x.shape[1], x.stride(0), float(q.threshold),
        K=q.ids.shape[1], W=W, BLOCK=block, CAUSAL=q.causal, NEAREST=q.nearest,
        num_warps=num_warps or (8 if W > 64 else 4), num_stages=stages, maxnreg=registers,
    )  # fmt: skip


if triton is not None:

    @triton.jit
    def _representatives(
        similarity, threshold, real, place, W: tl.constexpr, CAUSAL: tl.constexpr, NEAREST: tl.constexpr
    ):
        """(whether each row is represented by another, by the row in which place): `settle` for one window."""
        edges = (similarity >= threshold) & real[:, None] & real[None, :]
        if CAUSAL:
            edges = edges & (place[:, None] < place[None, :])
            key = W - place
        else:
            edges = edges & (place[:, None] != place[None, :])
            key = tl.sum(edges.to(tl.int32), axis=1) * W + (W - 1 - place)
        # From here on one tile says both: there is an edge where it is finite. More would not fit into registers.
        similarity = tl.where(edges, similarity, float("-inf"))
        state = tl.where(real, 1, 0)  # 2 represents, 1 open, 0 represented or empty
        num_open = tl.sum(real.to(tl.int32), axis=0)
        while num_open > 0:
            stops = similarity > float("-inf")
            if not CAUSAL:
                stops = stops & (key[:, None] > key[None, :])
            above = tl.max(tl.where(stops, state[:, None], 0), axis=0)  # 2: one stands for it; 1: one may yet
            settled = tl.where(above == 2, 0, tl.where(above == 1, 1, 2))
            state = tl.where(state == 1, settled, state)
            num_open = tl.sum((state == 1).to(tl.int32), axis=0)
        if not NEAREST:
            similarity = tl.where(similarity > float("-inf"), key[:, None].to(tl.float32), float("-inf"))
        score = tl.where((state == 2)[:, None], similarity, float("-inf"))
        condensed = real & (state == 0)
        # The first of the highest, without the tile of places that an argmax carries along.
        highest = tl.max(score, axis=0)
        best = tl.min(tl.where(score == highest[None, :], place[:, None], W), axis=0)
        return condensed, tl.where(condensed, best, place)

    @triton.jit
    def _choose(
        x, table, leader, sent, shared, D, stride, threshold,
        K: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, NEAREST: tl.constexpr,
    ):  # fmt: skip
        place = tl.arange(0, W)
        row = tl.load(table + tl.program_id(0) * W + place)
        real = row >= 0
        num_real = tl.sum(real.to(tl.int32), axis=0)
        if num_real > 0:
            token = tl.where(real, row, 0) // K
            start = token.to(tl.int64) * stride
            similarity = tl.zeros((W, W), dtype=tl.float32)
            depth = tl.where(num_real > 1, D, 0)  # who is alone in its window is like nobody
            for first in range(0, depth, BLOCK):
                column = first + tl.arange(0, BLOCK)
                mask = real[:, None] & (column < D)[None, :]
                tile = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0)
                similarity = tl.dot(tile, tl.trans(tile), similarity, input_precision="tf32x3")
            square = tl.sum(tl.where(place[:, None] == place[None, :], similarity, 0.0), axis=1)
            scale = tl.div_rn(tl.full((W,), 1.0, tl.float32), tl.maximum(tl.sqrt_rn(square), 1e-12))
            similarity = similarity * (scale[:, None] * scale[None, :])
            condensed, best = _representatives(similarity, threshold, real, place, W, CAUSAL, NEAREST)
            stands = tl.max(((best[None, :] == place[:, None]) & condensed[None, :]).to(tl.int32), axis=1) > 0
            other = tl.load(table + tl.program_id(0) * W + best)
            tl.store(leader + row, other.to(tl.int64), mask=real)
            tl.store(sent + row, (~condensed).to(tl.uint8), mask=real)
            tl.store(shared + row, stands.to(tl.uint8), mask=real)
