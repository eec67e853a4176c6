"""Representatives in windows of alike rows, in torch: who stands for whom, decided for many windows at once.

A window is up to W rows of one group. Who represents whom is decided in rounds: a row is settled as soon as every row
of higher priority that could stand for it is. That gives what going through the rows one at a time in order of priority
would (luffy.plan.condensation), in a few rounds: rows without a rival are settled at once.

Priority is the position in the window where `causal` (a window is in the order of time), else the degree, ties to the
lower position. NaN is like nothing: such a row represents itself alone, and reaches its expert and the loss.

This serves CPUs, float64 and the paper's whole graphs, and is what the kernel that GPUs run (luffy.kernels.condense) is
held to.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Elements of similarity tiles that are held at once: 64 MB in float32.
_TILE_ELEMENTS = 1 << 24


def choose_representatives(unit: Tensor, rows: Tensor, threshold: float, *, causal: bool, nearest: bool) -> Tensor:
    """unit [T, D]: rows of length one. rows int64 [windows, W]: rows of each window, -1 behind the last.

    Returns int64 [windows, W]: the place in the window of the row that represents each; its own for representatives
    and empty places.
    """
    W = rows.shape[1]
    out = torch.arange(W, device=rows.device).repeat(len(rows), 1)
    fill = (rows >= 0).sum(1)
    # Windows of like fill together, no wider than they need be; who is alone in one represents itself.
    for least, most in ((1, W // 4), (max(1, W // 4), W // 2), (max(1, W // 2), W)):
        for some in ((fill > least) & (fill <= most)).nonzero().squeeze(1).split(max(1, _TILE_ELEMENTS // W**2)):
            if len(some):
                width = int(fill[some].max())
                out[some, :width] = _in_tiles(unit, rows[some, :width], threshold, causal, nearest)
    return out


def _in_tiles(unit: Tensor, rows: Tensor, threshold: float, causal: bool, nearest: bool) -> Tensor:
    tile = unit[rows.clamp_min(0)]  # [w, W, D]
    similarity = tile @ tile.transpose(1, 2)  # [w, W, W]
    return settle(similarity, rows >= 0, threshold, causal, nearest)


def settle(similarity: Tensor, real: Tensor, threshold: float, causal: bool, nearest: bool) -> Tensor:
    """similarity [w, W, W], real bool [w, W] -> places of the representatives, int64 [w, W]."""
    W = real.shape[1]
    place = torch.arange(W, device=real.device)
    edges = similarity >= threshold
    edges &= place[:, None] < place[None, :] if causal else place[:, None] != place[None, :]
    edges &= real[:, None, :]
    # [w, i, j] of `stops`: i, if it represents, stands for j. A higher key goes first; all differ.
    if causal:
        key, stops = (W - place).expand(real.shape), edges
    else:
        edges &= real[:, :, None]
        key = edges.sum(2) * W + (W - 1 - place)
        stops = edges & (key[:, :, None] > key[:, None, :])
    open_, represents = real.clone(), torch.zeros_like(real)
    reach = stops.to(torch.float32)  # as a matrix product both questions are one pass over the tile
    while bool(open_.any()):
        hits = torch.stack([represents, open_], dim=1).to(reach.dtype) @ reach  # [w, 2, W]
        covered, waiting = hits[:, 0] > 0, hits[:, 1] > 0
        represents |= open_ & ~covered & ~waiting
        open_ &= ~covered & waiting
    score = similarity if nearest else key[:, :, None].to(similarity.dtype).expand_as(similarity)
    score = torch.where(edges & represents[:, :, None], score, -torch.inf)
    return torch.where(real & ~represents, score.argmax(1), place)
