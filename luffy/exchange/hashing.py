"""Buckets of rows that hash alike: cross-polytope hashing, as LSH-MoE uses it (NeurIPS 2024, arXiv 2411.08446).

A cross-polytope hash turns a row by a random rotation and names the axis, and its sign, that it then lies closest to.
Rows that agree in all hashes share a bucket. The rotations are those of Gaussian matrices, drawn once per layer from a
fixed seed; how many axes they keep the paper does not say, and is `AXES` here.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from luffy.data.batch import Layout

AXES = 16


@functools.lru_cache(maxsize=64)
def _rotations(size: int, num_hashes: int, layer: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """[D, num_hashes * AXES]: orthonormal columns within each hash."""
    generator = torch.Generator().manual_seed(7_919 * layer + num_hashes)
    axes = min(AXES, size)
    blocks = [torch.linalg.qr(torch.randn(size, axes, generator=generator))[0] for _ in range(num_hashes)]
    return torch.cat(blocks, dim=1).to(device, dtype)


def hash_codes(x: Tensor, num_hashes: int, layer: int) -> Tensor:
    """[T, D] -> one code for all hashes together, int64 [T]."""
    rotated = (x @ _rotations(x.shape[1], num_hashes, layer, x.device, x.dtype)).unflatten(1, (num_hashes, -1))
    axis = rotated.abs().argmax(2, keepdim=True)  # [T, num_hashes, 1]
    vertex = 2 * axis + (rotated.gather(2, axis) < 0)
    code = torch.zeros(x.shape[0], dtype=torch.int64, device=x.device)
    for h in range(num_hashes):
        # Up to 16 hashes of 32 vertices do not fit in 63 bits; an odd multiplier spreads what wraps around.
        code = code * 0x2545F4914F6CDD1D + vertex[:, h, 0] + 1
    return code


def same_bucket(x: Tensor, group: Tensor, num_groups: int, layout: Layout, num_hashes: int, layer: int) -> Tensor:
    """The earliest copy of each copy's bucket, by position, then sequence: int64 [T * K]."""
    T, K = group.shape
    code = hash_codes(x, num_hashes, layer)
    time = layout.moment[:, None].expand(T, K).flatten()
    flat, codes = group.flatten(), code[:, None].expand(T, K).flatten()
    # Three stable sorts, the least important first: by time, by code, by group.
    order = time.argsort(stable=True)
    order = order[codes[order].argsort(stable=True)]
    order = order[flat[order].argsort(stable=True)]
    g, c = flat[order], codes[order]
    index = torch.arange(T * K, device=x.device)
    new = torch.ones_like(g, dtype=torch.bool)
    new[1:] = (g[1:] != g[:-1]) | (c[1:] != c[:-1])
    new |= g == num_groups
    leader = torch.empty_like(index)
    leader[order] = order[torch.where(new, index, 0).cummax(0).values]
    return leader
