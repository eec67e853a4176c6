"""Rows between any ranks of the world, without gradient: for token ids and results, which are few bytes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.comm.collectives import Comm


@torch.no_grad()
def all_to_all_world(rows: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], comm: Comm) -> Tensor:
    """[n, ...] of any dtype -> [m, ...]: `input_splits[r]` rows of mine, in their order, to world rank r, and
    `output_splits[r]` from r. Every rank calls it, with rows of one shape and dtype."""
    mesh = comm.mesh
    if mesh.world_size == 1:
        return rows.detach()
    flat = rows.detach().to(mesh.device).contiguous()
    sent = (flat.unsqueeze(1) if flat.dim() == 1 else flat.flatten(1)).view(torch.uint8)
    for peer, count in enumerate(input_splits):
        if peer != mesh.rank:
            comm.meter.send("control", peer, count * sent.shape[1])
    received = sent.new_empty((sum(output_splits), sent.shape[1]))
    dist.all_to_all_single(received, sent, list(output_splits), list(input_splits), group=mesh.world_group)
    return received.view(rows.dtype).reshape(len(received), *rows.shape[1:])
