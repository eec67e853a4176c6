"""Rows between ranks: one differentiable all-to-all, which may travel while something else is computed.

It moves several tensors that share their leading dimension in ONE message per peer: each becomes a few columns of a
byte matrix. That keeps the number of messages low (a slow link is often a distant one too), lets any dtype cross any
backend (gloo knows no float8), and gives a wire format one place to put payload and scales.

The backward of an all-to-all is the all-to-all with the splits exchanged: what dispatch scattered, its backward
gathers. A rank with nothing to send or receive still takes part, forward and backward.

`depart` sends rows off and returns at once; `arrive` waits for them. What is computed between the two runs beside the
transfer. Backward, `arrive` comes first and sends the gradients off; `depart`, which autograd reaches after everything
that was computed between the two, waits for them. So whatever hid a transfer forward hides its gradients as well.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from luffy.comm.collectives import Comm


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


@dataclass
class _Message:
    """One all-to-all under way. `send` and `receive` must live until it is over."""

    send: Tensor
    receive: Tensor
    widths: list[int]  # bytes of each tensor's part of a row
    shapes: Sequence[tuple[int, ...]]  # of each tensor's rows
    dtypes: list[torch.dtype]
    codecs: Sequence[Codec | None]
    work: Any = None

    @property
    def is_over(self) -> bool:
        return self.work is None or self.work.is_completed()

    def wait(self) -> list[Tensor]:
        """The tensors that arrived."""
        if self.work is not None:
            self.work.wait()
        moved, start = [], 0
        for width, shape, dtype, codec in zip(self.widths, self.shapes, self.dtypes, self.codecs, strict=True):
            block = self.receive[:, start : start + width]
            start += width
            if codec is not None:
                moved.append(codec.decode(block, shape[0], dtype))
                continue
            if len(self.widths) > 1:  # a copy, since a dtype needs its own alignment and strides
                block = block.clone(memory_format=torch.contiguous_format)
            block = block.view(dtype)
            moved.append(block.reshape(block.shape[0], *shape))
        return moved


def _send(
    tensors: Sequence[Tensor], directions: Sequence[str], exchange: RowExchange, codecs: Sequence[Codec | None]
) -> _Message:
    """Start one all-to-all of `tensors` side by side."""
    mesh, meter = exchange.comm.mesh, exchange.comm.meter
    columns = [_as_bytes(t) if c is None else c.encode(t) for t, c in zip(tensors, codecs, strict=True)]
    widths = [c.shape[1] for c in columns]

    def count() -> None:
        for width, direction in zip(widths, directions, strict=True):
            for peer, rows in zip(mesh.ep_ranks, exchange.input_splits, strict=True):
                meter.send(direction, peer, rows * width)

    send = columns[0] if len(columns) == 1 else torch.cat(columns, dim=1)
    shapes, dtypes = [t.shape[1:] for t in tensors], [t.dtype for t in tensors]
    if mesh.ep_size == 1 or exchange.idle:
        count()
        receive, work = send.clone(), None
    else:
        receive, work = exchange.comm.start_rows(send, exchange.input_splits, exchange.output_splits, count)
    return _Message(send, receive, widths, shapes, dtypes, codecs, work)


@dataclass
class RowsUnderWay:
    """Rows between `depart` and `arrive`, and their gradients between the backward passes of the two.

    token: what ties the two together in the autograd graph; it has no elements.
    """

    exchange: RowExchange
    backward_directions: tuple[str, ...]
    codecs: tuple[tuple[Codec | None, Codec | None], ...]
    differentiable: list[bool] = field(default_factory=list)
    token: Tensor | None = None
    message: _Message | None = None

    def take(self) -> list[Tensor]:
        """Wait for what is under way, forward or backward."""
        assert self.message is not None, "arrive follows depart, once"
        message, self.message = self.message, None
        return message.wait()

    def is_over(self) -> bool:
        """Whether what is under way has arrived already."""
        return self.message is None or self.message.is_over

    @property
    def returning(self) -> list[int]:
        """The tensors whose gradients travel back."""
        return [i for i, yes in enumerate(self.differentiable) if yes]


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, under_way, directions, *tensors):
        ctx.under_way = under_way
        # Decided from dtypes, which all ranks share, not from requires_grad, which they might not.
        under_way.differentiable = [t.is_floating_point() for t in tensors]
        under_way.message = _send(tensors, directions, under_way.exchange, [c for c, _ in under_way.codecs])
        return torch.zeros(0, device=under_way.message.send.device)

    @staticmethod
    def backward(ctx, _token):
        under_way = ctx.under_way
        out: list[Tensor | None] = [None] * len(under_way.differentiable)
        for i, grad in zip(under_way.returning, under_way.take(), strict=True):
            out[i] = grad
        return None, None, *out


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, under_way, token):
        ctx.under_way = under_way
        moved = under_way.take()
        ctx.mark_non_differentiable(*(m for m in moved if not m.is_floating_point()))
        return tuple(moved)

    @staticmethod
    def backward(ctx, *grads):
        under_way, picked = ctx.under_way, ctx.under_way.returning
        under_way.message = _send(
            [grads[i] for i in picked],
            [under_way.backward_directions[i] for i in picked],
            under_way.exchange.reversed(),
            [under_way.codecs[i][1] for i in picked],
        )
        return None, torch.zeros(0, device=under_way.message.send.device)


def depart(
    tensors: Sequence[Tensor],
    exchange: RowExchange,
    *,
    directions: Sequence[str],
    backward_directions: Sequence[str],
    codecs: Codecs | None = None,
) -> RowsUnderWay:
    """Send rows to the ranks of the EP group; `arrive` gives those of the others. Differentiable in floating tensors.

    tensors: each [sum(input_splits), ...], rows ordered by destination rank.
    directions, backward_directions: the meter's name for each tensor's bytes, forward and backward.
    codecs: how each tensor is written on the wire (coded ones are [n, D]); None: all as they are.
    """
    coding = tuple(codecs) if codecs is not None else ((None, None),) * len(tensors)
    under_way = RowsUnderWay(exchange, tuple(backward_directions), coding)
    under_way.token = _Depart.apply(under_way, tuple(directions), *tensors)
    return under_way


def arrive(under_way: RowsUnderWay) -> list[Tensor]:
    """Wait for what has departed: tensors of [sum(output_splits), ...], rows ordered by source rank."""
    return list(_Arrive.apply(under_way, under_way.token))


def all_to_all_rows(
    tensors: Sequence[Tensor],
    exchange: RowExchange,
    *,
    directions: Sequence[str],
    backward_directions: Sequence[str],
    codecs: Codecs | None = None,
) -> list[Tensor]:
    """`depart` and `arrive` at once."""
    return arrive(
        depart(tensors, exchange, directions=directions, backward_directions=backward_directions, codecs=codecs)
    )
