"""Weights of which every rank keeps some rows only, gathered when they are needed.

A replicated weight costs every rank its values, their gradients and two moments. A sharded one is cut along its first
dimension over *all* ranks: what a rank keeps, adds gradients to and updates is an ordinary small parameter, so that
optimizer, clipping and checkpoints need to know little. `gather` makes the whole weights, in the type that products
are computed in; its backward pass sums their gradients over all ranks and hands each its rows.

Collectives: one all-gather for all weights that are asked for together, one reduce-scatter for their gradients. Every
rank must gather the same weights in the same order, whether or not it has rows to use them on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from luffy.comm import Comm, Mesh


def is_sharded(parameter: Tensor) -> bool:
    return hasattr(parameter, "whole_shape")


def whole_shape(parameter: Tensor) -> torch.Size:
    """Of a sharded parameter: the shape that all ranks' rows make together."""
    shape: torch.Size = parameter.whole_shape  # type: ignore[attr-defined]
    return shape


def rows_per_rank(num_rows: int, world_size: int) -> int:
    """As torch's `Shard(0)` divides: so many for each rank but the last ones, which may have fewer or none."""
    return -(-num_rows // world_size)


def shard_of(parameter: nn.Parameter, mesh: Mesh) -> nn.Parameter:
    """This rank's rows of a whole parameter, as a parameter of its own."""
    first, end = _span(parameter.shape[0], mesh)
    shard = nn.Parameter(parameter.detach()[first:end].clone(), requires_grad=parameter.requires_grad)
    mark_sharded(shard, parameter.shape)
    return shard


def mark_sharded(rows: Tensor, whole: torch.Size) -> None:
    """Say that these are this rank's rows of a tensor of shape `whole`."""
    rows.whole_shape = whole  # type: ignore[attr-defined]


def rows_of(parameter: Tensor, mesh: Mesh) -> tuple[int, int]:
    """Which rows of a sharded parameter this rank has, from and up to."""
    return _span(whole_shape(parameter)[0], mesh)


def _span(num_rows: int, mesh: Mesh) -> tuple[int, int]:
    share = rows_per_rank(num_rows, mesh.world_size)
    return min(mesh.rank * share, num_rows), min((mesh.rank + 1) * share, num_rows)


def gather(comm: Comm, shards: Sequence[Tensor], dtype: torch.dtype | None = None) -> list[Tensor]:
    """The whole weights of sharded parameters, in `dtype` (None: their own, which must be one); differentiable."""
    if not shards:
        return []
    shapes = [whole_shape(p) for p in shards]
    return list(_Gather.apply(comm, shapes, dtype or shards[0].dtype, *shards))


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, comm: Comm, shapes: list[torch.Size], dtype: torch.dtype, *shards: Tensor) -> Any:
        ctx.comm, ctx.shapes, ctx.dtypes = comm, shapes, [p.dtype for p in shards]
        world = comm.mesh.world_size
        sizes = _padded_sizes(shapes, world)
        packed = shards[0].new_zeros(sum(sizes), dtype=dtype)  # this rank's rows, end to end, padded
        for part, p in zip(packed.split(sizes), shards, strict=True):
            part[: p.numel()] = p.flatten()
        parts = comm.all_gather_world(packed, "gradients").split(sizes, dim=1)  # [world, size] each
        # A copy each: a storage of its own, so that it can be told from others and freed alone.
        return tuple(
            part.flatten()[: shape.numel()].view(shape).clone() for part, shape in zip(parts, shapes, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        mesh = ctx.comm.mesh
        world = mesh.world_size
        wanted = [i for i in range(len(grads)) if ctx.needs_input_grad[3 + i]]
        shapes = [ctx.shapes[i] for i in wanted]
        sizes = _padded_sizes(shapes, world)
        # Summed in the parameters' own type, as replicated ones are.
        packed = grads[0].new_zeros(world, sum(sizes), dtype=ctx.dtypes[wanted[0]])
        for part, i, size in zip(packed.split(sizes, dim=1), wanted, sizes, strict=True):
            flat = grads[i].new_zeros(world * size, dtype=packed.dtype)
            flat[: grads[i].numel()] = grads[i].flatten()
            part.copy_(flat.view(world, size))
        summed = ctx.comm.reduce_scatter_world(packed)
        out: list[Tensor | None] = [None] * len(grads)
        for part, i, shape in zip(summed.split(sizes), wanted, shapes, strict=True):
            first, end = _span(shape[0], mesh)
            out[i] = part.view(-1, *shape[1:])[: end - first]
        return None, None, None, *out


def _padded_sizes(shapes: Sequence[torch.Size], world_size: int) -> list[int]:
    """Elements of each weight on one rank, padded to be as many on each."""
    return [rows_per_rank(shape[0], world_size) * shape[1:].numel() for shape in shapes]
