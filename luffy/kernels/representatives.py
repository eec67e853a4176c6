"""Representatives of windows of alike rows: similarity, threshold, degree and choice in one kernel.

A window is up to W rows of one group. Its W x W cosines are one tile on the matrix units and never leave the chip, so
memory is linear in rows. Who represents whom is decided in rounds: a row is settled as soon as every row of higher
priority that could stand for it is. That gives what going through the rows one at a time in order of priority would
(luffy.plan.condensation), in a few rounds: rows without a rival are settled at once.

Priority is the position in the window where `causal` (a window is in the order of time), else the degree, ties to the
lower position. NaN is like nothing: such a row represents itself alone, and reaches its expert and the loss.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference serves
    triton = None

# Elements of similarity tiles that the reference holds at once: 64 MB in float32.
_TILE_ELEMENTS = 1 << 24


def choose_representatives(
    unit: Tensor, rows: Tensor, threshold: float, *, causal: bool, nearest: bool, kernel: bool | None = None
) -> Tensor:
    """unit [T, D]: rows of length one. rows int64 [windows, W]: rows of each window, -1 behind the last.

    Returns int64 [windows, W]: the place in the window of the row that represents each; its own for representatives
    and empty places. kernel: force the Triton kernel or the reference; None: the kernel on a GPU.
    """
    if kernel is None:
        kernel = triton is not None and unit.is_cuda and unit.dtype != torch.float64 and 16 <= rows.shape[1] <= 128
    if rows.numel() == 0:
        return torch.zeros_like(rows)
    if kernel:
        return _by_kernel(unit, rows, threshold, causal, nearest)
    step = max(1, _TILE_ELEMENTS // rows.shape[1] ** 2)
    return torch.cat([_by_torch(unit, r, threshold, causal, nearest) for r in rows.split(step)])


def _by_torch(unit: Tensor, rows: Tensor, threshold: float, causal: bool, nearest: bool) -> Tensor:
    tile = unit[rows.clamp_min(0)]  # [w, W, D]
    similarity = tile @ tile.transpose(1, 2)  # [w, W, W]
    return settle(similarity, rows >= 0, threshold, causal, nearest)


def settle(similarity: Tensor, real: Tensor, threshold: float, causal: bool, nearest: bool) -> Tensor:
    """similarity [w, W, W], real bool [w, W] -> places of the representatives, int64 [w, W]."""
    W = real.shape[1]
    place = torch.arange(W, device=real.device)
    edges = (similarity >= threshold) & real[:, :, None] & real[:, None, :]
    edges &= place[:, None] < place[None, :] if causal else place[:, None] != place[None, :]
    # A higher key goes first; all differ.
    key = (W - place).expand(real.shape) if causal else edges.sum(2) * W + (W - 1 - place)
    stops = edges & (key[:, :, None] > key[:, None, :])  # [w, i, j]: i, if it represents, stands for j
    open_, represents = real.clone(), torch.zeros_like(real)
    reach = stops.to(torch.float32)  # as a matrix product both questions are one pass over the tile
    while bool(open_.any()):
        hits = torch.stack([represents, open_], dim=1).to(reach.dtype) @ reach  # [w, 2, W]
        covered, waiting = hits[:, 0] > 0, hits[:, 1] > 0
        represents |= open_ & ~covered & ~waiting
        open_ &= ~covered & waiting
    score = similarity if nearest else key[:, :, None].to(similarity.dtype).expand_as(similarity)
    score = score.masked_fill(~(edges & represents[:, :, None]), -torch.inf)
    return torch.where(real & ~represents, score.argmax(1), place)


if triton is not None:

    @triton.jit
    def _kernel(
        unit, rows, out, D, stride, threshold,
        W: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, NEAREST: tl.constexpr,
    ):  # fmt: skip
        window = tl.program_id(0).to(tl.int64)
        place = tl.arange(0, W)
        row = tl.load(rows + window * W + place)
        real = row >= 0
        start = tl.where(real, row, 0) * stride
        similarity = tl.zeros((W, W), dtype=tl.float32)
        if tl.sum(real.to(tl.int32), axis=0) > 1:
            for first in range(0, D, BLOCK):
                column = first + tl.arange(0, BLOCK)
                mask = real[:, None] & (column < D)[None, :]
                tile = tl.load(unit + start[:, None] + column[None, :], mask=mask, other=0.0)
                similarity = tl.dot(tile, tl.trans(tile), similarity, input_precision="tf32x3")
        edges = (similarity >= threshold) & real[:, None] & real[None, :]
        if CAUSAL:
            edges = edges & (place[:, None] < place[None, :])
            key = W - place
        else:
            edges = edges & (place[:, None] != place[None, :])
            key = tl.sum(edges.to(tl.int32), axis=1) * W + (W - 1 - place)
        stops = (edges & (key[:, None] > key[None, :])).to(tl.int32)
        # 0 open, 1 represents, 2 represented or empty
        state = tl.where(real, 0, 2)
        num_open = tl.sum(real.to(tl.int32), axis=0)
        while num_open > 0:
            covered = tl.max(stops * (state == 1).to(tl.int32)[:, None], axis=0)
            waiting = tl.max(stops * (state == 0).to(tl.int32)[:, None], axis=0)
            settled = tl.where(covered > 0, 2, tl.where(waiting > 0, 0, 1))
            state = tl.where(state == 0, settled, state)
            num_open = tl.sum((state == 0).to(tl.int32), axis=0)
        score = similarity
        if not NEAREST:
            score = key[:, None].to(tl.float32) + tl.zeros((W, W), dtype=tl.float32)
        score = tl.where(edges & (state == 1)[:, None], score, float("-inf"))
        best = tl.argmax(score, axis=0)
        tl.store(out + window * W + place, tl.where(real & (state == 2), best, place).to(tl.int64))


def _by_kernel(unit: Tensor, rows: Tensor, threshold: float, causal: bool, nearest: bool) -> Tensor:
    W, out = rows.shape[1], torch.empty_like(rows)
    unit, rows = unit.contiguous(), rows.contiguous()
    launch: Any = _kernel[(rows.shape[0],)]
    launch(
        unit, rows, out, unit.shape[1], unit.stride(0), threshold,
        W=W, BLOCK=64, CAUSAL=causal, NEAREST=nearest, num_warps=8 if W > 64 else 4,
    )  # fmt: skip
    return out
