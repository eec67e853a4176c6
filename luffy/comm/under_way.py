"""Rows that travel while something else is computed, forward and backward.

`depart` starts an all-to-all and returns its buffer at once; `arrive` waits and hands it on. What is computed between
the two runs beside the transfer. In the backward pass `arrive` comes first: it starts the gradients' way back, and
`depart`, which autograd reaches after everything made between the two, waits for them.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.comm.collectives import RowExchange


@dataclass
class UnderWay:
    """One exchange of rows [n, W] of a floating dtype, metered under `direction` both ways."""

    exchange: RowExchange
    direction: str
    returned: Tensor | None = None  # gradients on their way back, in the backward pass
    _work: dist.Work | None = None
    _buffers: list[Tensor] = field(default_factory=list)  # must live until the work is done

    def start(self, rows: Tensor, exchange: RowExchange) -> Tensor:
        mesh, meter = exchange.comm.mesh, exchange.comm.meter
        rows = rows.contiguous()
        receive = rows.new_empty((sum(exchange.output_splits), rows.shape[1]))
        for peer, n in zip(mesh.ep_ranks, exchange.input_splits, strict=True):
            meter.send(self.direction, peer, n * rows.shape[1] * rows.element_size())
        if mesh.ep_size == 1:
            receive.copy_(rows)
            return receive
        self._buffers = [rows, receive]
        self._work = dist.all_to_all_single(
            receive, rows, list(exchange.output_splits), list(exchange.input_splits), group=mesh.ep_group, async_op=True
        )
        return receive

    def wait(self) -> None:
        if self._work is not None:
            self._work.wait()
        self._work, self._buffers = None, []


class _Depart(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, under_way: UnderWay) -> Tensor:
        ctx.under_way = under_way
        return under_way.start(rows, under_way.exchange)

    @staticmethod
    def backward(ctx, _: Tensor):
        # The gradient that autograd brings is only a promise (see _Arrive): the real one has been travelling.
        ctx.under_way.wait()
        return ctx.under_way.returned, None


class _Arrive(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows: Tensor, under_way: UnderWay) -> Tensor:
        ctx.under_way = under_way
        under_way.wait()
        return rows.view_as(rows)

    @staticmethod
    def backward(ctx, grad: Tensor):
        under_way = ctx.under_way
        under_way.returned = under_way.start(grad, under_way.exchange.reversed())
        return grad, None


def depart(rows: Tensor, under_way: UnderWay) -> Tensor:
    """rows [sum(input_splits), W] -> the buffer that they will be in, not to be read before `arrive`."""
    return _Depart.apply(rows, under_way)


def arrive(rows: Tensor, under_way: UnderWay) -> Tensor:
    """What `depart` returned -> the same, there: [sum(output_splits), W]."""
    return _Arrive.apply(rows, under_way)
