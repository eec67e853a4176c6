"""The collectives: one differentiable all-to-all of rows, and the small metered ones around it.

`all_to_all_rows` moves several tensors that share their leading dimension in ONE message per peer: each becomes a
few columns of a byte matrix. That keeps the number of messages low (a slow link is often a distant one too), lets
any dtype cross any backend (gloo knows no float8), and gives a wire format one place to put payload and scales.

The backward of an all-to-all is the all-to-all with the splits exchanged: what dispatch scattered, its backward
gathers. A rank with nothing to send or receive still takes part, forward and backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.comm.mesh import Mesh
from luffy.comm.meter import TrafficMeter

# Renamed between releases of torch.
_all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class Comm:
    """What the exchange needs of the network: the mesh and the meter that every collective reports to."""

    mesh: Mesh
    meter: TrafficMeter

    @classmethod
    def create(cls, mesh: Mesh) -> Comm:
        return cls(mesh, TrafficMeter(mesh.rank, mesh.node_of_rank))

    def all_reduce(self, tensor: Tensor, direction: str = "control") -> Tensor:
        """Sum over the world, in place."""
        if self.mesh.world_size > 1:
            dist.all_reduce(tensor, group=self.mesh.world_group)
            self.meter.all_reduce(direction, list(range(self.mesh.world_size)), tensor.nbytes)
        return tensor

    def all_reduce_ep(self, tensor: Tensor, direction: str = "control") -> Tensor:
        """Sum over the EP group, in place."""
        if self.mesh.ep_size > 1:
            dist.all_reduce(tensor, group=self.mesh.ep_group)
            self.meter.all_reduce(direction, self.mesh.ep_ranks, tensor.nbytes)
        return tensor

    def all_gather_world(self, tensor: Tensor) -> Tensor:
        """[n...] on each rank -> [world_size, n...] on all ranks of the world. Shapes must agree."""
        return self._all_gather(tensor, self.mesh.world_group, range(self.mesh.world_size))

    def all_gather_ep(self, tensor: Tensor) -> Tensor:
        """[n...] on each rank -> [ep_size, n...] on all ranks of the EP group. Shapes must agree."""
        return self._all_gather(tensor, self.mesh.ep_group, self.mesh.ep_ranks)

    def start_all_gather_ep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to gather a host tensor [n...] of every rank of the EP group; the call it returns waits for it.

        Waiting does not wait for other work of the device, so that a few bytes can be compared while it computes.
        """
        mesh = self.mesh
        if mesh.ep_size == 1:
            return lambda: tensor.unsqueeze(0)
        self.meter.all_gather("control", mesh.ep_ranks, tensor.nbytes)
        on_device = dist.get_backend(mesh.ep_group) == "nccl"
        flat = (tensor.to(mesh.device) if on_device else tensor).flatten()
        out = flat.new_empty(mesh.ep_size * flat.numel())
        work = _all_gather_flat(out, flat, group=mesh.ep_group, async_op=True)

        def finish() -> Tensor:
            if on_device:
                with torch.cuda.stream(torch.cuda.Stream(mesh.device)):
                    work.wait()
                    host = out.cpu()
            else:
                work.wait()
                host = out
            return host.reshape(mesh.ep_size, *tensor.shape)

        return finish

    def _all_gather(self, tensor: Tensor, group: dist.ProcessGroup, ranks: Sequence[int]) -> Tensor:
        if len(ranks) == 1:
            return tensor.unsqueeze(0)
        out = tensor.new_empty(len(ranks) * tensor.numel())
        _all_gather_flat(out, tensor.contiguous().flatten(), group=group)
        self.meter.all_gather("control", ranks, tensor.nbytes)
        return out.unflatten(0, (len(ranks), tensor.numel())).reshape(len(ranks), *tensor.shape)


class Codec(Protocol):
    """A way to write rows on the wire; see luffy.exchange.wire."""

    def encode(self, rows: Tensor) -> Tensor:
        """[n, D] -> uint8 [n, width]."""
        ...

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, width] -> [n, size] of dtype."""
        ...


# For each tensor, how it travels forward and its gradient backward; None: as it is.
Codecs = Sequence[tuple[Codec | None, Codec | None]]


@dataclass(frozen=True)
class RowExchange:
    """Where rows go: `input_splits[r]` of mine to EP rank r, `output_splits[r]` from r. The own entry may be 0.

    idle: every rank knows that no rank sends anything, so that they need not even meet.
    """

    comm: Comm
    input_splits: tuple[int, ...]
    output_splits: tuple[int, ...]
    idle: bool = False

    def reversed(self) -> RowExchange:
        return RowExchange(self.comm, self.output_splits, self.input_splits, self.idle)


def _as_bytes(tensor: Tensor) -> Tensor:
    """[n, ...] of any dtype -> uint8 [n, width]."""
    flat = tensor.unsqueeze(1) if tensor.dim() == 1 else tensor.flatten(1)
    return flat.contiguous().view(torch.uint8)


def _move(
    tensors: Sequence[Tensor],
    directions: Sequence[str],
    exchange: RowExchange,
    codecs: Sequence[Codec | None],
    meanwhile: Callable[[], None] | None = None,
) -> list[Tensor]:
    """One all-to-all of `tensors` side by side; `meanwhile` runs on the host while the rows are under way."""
    mesh, meter = exchange.comm.mesh, exchange.comm.meter
    columns = [_as_bytes(t) if c is None else c.encode(t) for t, c in zip(tensors, codecs, strict=True)]
    widths = [c.shape[1] for c in columns]
    for width, direction in zip(widths, directions, strict=True):
        for peer, rows in zip(mesh.ep_ranks, exchange.input_splits, strict=True):
            meter.send(direction, peer, rows * width)
    send = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    receive = send.new_empty((sum(exchange.output_splits), send.shape[1]))
    if mesh.ep_size == 1 or exchange.idle:
        receive.copy_(send)
        work = None
    else:
        work = dist.all_to_all_single(
            receive,
            send,
            list(exchange.output_splits),
            list(exchange.input_splits),
            group=mesh.ep_group,
            async_op=True,
        )
    if meanwhile is not None:
        begin = time.perf_counter()
        meanwhile()
        if work is None or work.is_completed():
            meter.exposed_seconds += time.perf_counter() - begin
    if work is not None:
        work.wait()
    moved, start = [], 0
    for tensor, width, codec in zip(tensors, widths, codecs, strict=True):
        block = receive[:, start : start + width]
        start += width
        if codec is not None:
            moved.append(codec.decode(block, tensor.shape[1], tensor.dtype))
            continue
        if len(tensors) > 1:  # a copy, since a dtype needs its own alignment and strides
            block = block.clone(memory_format=torch.contiguous_format)
        block = block.view(tensor.dtype)
        moved.append(block.reshape(block.shape[0], *tensor.shape[1:]))
    return moved


class _AllToAllRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, exchange, forward_directions, backward_directions, codecs, meanwhile, *tensors):
        ctx.exchange, ctx.codecs = exchange, codecs
        ctx.backward_directions = backward_directions
        # Decided from dtypes, which all ranks share, not from requires_grad, which they might not.
        ctx.differentiable = [t.is_floating_point() for t in tensors]
        moved = _move(tensors, forward_directions, exchange, [c for c, _ in codecs], meanwhile)
        ctx.mark_non_differentiable(*(m for m in moved if not m.is_floating_point()))
        return tuple(moved)

    @staticmethod
    def backward(ctx, *grads):
        picked = [i for i, yes in enumerate(ctx.differentiable) if yes]
        moved = _move(
            [grads[i] for i in picked],
            [ctx.backward_directions[i] for i in picked],
            ctx.exchange.reversed(),
            [ctx.codecs[i][1] for i in picked],
        )
        out: list[Tensor | None] = [None] * len(grads)
        for i, grad in zip(picked, moved, strict=True):
            out[i] = grad
        return None, None, None, None, None, *out


def all_to_all_rows(
    tensors: Sequence[Tensor],
    exchange: RowExchange,
    *,
    directions: Sequence[str],
    backward_directions: Sequence[str],
    codecs: Codecs | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> list[Tensor]:
    """Send rows to the ranks of the EP group and receive theirs; differentiable in every floating tensor.

    tensors: each [sum(input_splits), ...], rows ordered by destination rank.
    directions, backward_directions: the meter's name for each tensor's bytes, forward and backward.
    codecs: how each tensor is written on the wire (coded ones are [n, D]); None: all as they are.
    meanwhile: host work to do while the rows travel (planning).
    Returns tensors of [sum(output_splits), ...], rows ordered by source rank.
    """
    coding = tuple(codecs) if codecs is not None else ((None, None),) * len(tensors)
    return list(
        _AllToAllRows.apply(exchange, tuple(directions), tuple(backward_directions), coding, meanwhile, *tensors)
    )
