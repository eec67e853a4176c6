"""Guests: experts that a rank holds for a layer without owning them.

Executes a `luffy.plan.residency.Delivery`: parts of experts from owners to relays to guests' ranks, and the gradients
back the same way. `send_off` starts the first round and returns; `take_in` waits for it and does the second. In
between there is time for something else to be computed.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.comm import Comm, RowExchange, RowsUnderWay, arrive, depart
from luffy.plan.residency import Delivery


@dataclass(frozen=True)
class Guests:
    """ids: int64 [F] (host), the experts; weights [F, W], all of an expert's parameters end to end."""

    ids: np.ndarray
    weights: Tensor

    def joined(self, other: Guests) -> Guests:
        return Guests(np.concatenate([self.ids, other.ids]), torch.cat([self.weights, other.weights]))


@dataclass(frozen=True)
class Departed:
    """A delivery whose first round is under way. width: elements of an expert."""

    delivery: Delivery
    under_way: RowsUnderWay
    width: int


class _Pick(torch.autograd.Function):
    """rows[index] as dtype. A row that goes to many gets its gradients summed in float32 at least."""

    @staticmethod
    def forward(ctx, rows: Tensor, index: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(index)
        ctx.shape, ctx.dtype = rows.shape, rows.dtype
        return rows[index].to(dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (index,) = ctx.saved_tensors
        wide = torch.promote_types(ctx.dtype, torch.float32)
        total = torch.zeros(ctx.shape, dtype=wide, device=grad.device)
        return total.index_add_(0, index, grad.to(wide)).to(ctx.dtype), None, None


def _pick(rows: Tensor, index: np.ndarray, dtype: torch.dtype) -> Tensor:
    return _Pick.apply(rows, torch.from_numpy(index).to(rows.device), dtype)


def _sent(moves: np.ndarray, rank: int) -> np.ndarray:
    """The moves from a rank, in the order in which its rows are sent."""
    mine = moves[moves[:, 0] == rank]
    return mine[np.lexsort((mine[:, 3], mine[:, 2], mine[:, 1]))]


def _arriving(moves: np.ndarray, rank: int) -> np.ndarray:
    """The moves to a rank, in the order in which its rows arrive."""
    mine = moves[moves[:, 1] == rank]
    return mine[np.lexsort((mine[:, 3], mine[:, 2], mine[:, 0]))]


def _depart(rows: Tensor, moves: np.ndarray, comm: Comm) -> RowsUnderWay:
    me, N = comm.mesh.ep_rank, comm.mesh.ep_size
    out = np.bincount(moves[moves[:, 0] == me, 1], minlength=N)
    into = np.bincount(moves[moves[:, 1] == me, 0], minlength=N)
    exchange = RowExchange(comm, tuple(out.tolist()), tuple(into.tolist()))
    return depart([rows], exchange, directions=("experts",), backward_directions=("experts",))


def send_off(weights: Tensor, slots: np.ndarray, delivery: Delivery, comm: Comm, dtype: torch.dtype) -> Departed:
    """Start a delivery. weights [n, W]: this rank's own experts; slots int64 [E]: the slot of each expert, as ever.

    dtype: in which weights travel and gradients return: what the experts compute in.
    """
    n, width = weights.shape
    weights = F.pad(weights, (0, -width % delivery.parts))
    sent = _sent(delivery.first, comm.mesh.ep_rank)
    index = (slots[sent[:, 2]] - comm.mesh.ep_rank * n) * delivery.parts + sent[:, 3]
    rows = _pick(weights.view(n * delivery.parts, weights.shape[1] // delivery.parts), index, dtype)
    return Departed(delivery, _depart(rows, delivery.first, comm), width)


def take_in(departed: Departed, comm: Comm) -> Guests:
    """Wait for the first round, do the second: the guests of this rank."""
    delivery, me = departed.delivery, comm.mesh.ep_rank
    (rows,) = arrive(departed.under_way)
    names = _arriving(delivery.first, me)[:, 2:] @ [delivery.parts, 1]
    if len(delivery.second):
        relayed = _sent(delivery.second, me)[:, 2:] @ [delivery.parts, 1]
        order = np.argsort(names)
        index = order[np.searchsorted(names[order], relayed)] if len(relayed) else relayed
        (more,) = arrive(_depart(_pick(rows, index, rows.dtype), delivery.second, comm))
        rows = torch.cat([rows, more])
        names = np.concatenate([names, _arriving(delivery.second, me)[:, 2:] @ [delivery.parts, 1]])
    ids = delivery.guests_of(me)
    # Parts by expert: every part has arrived once, so sorting by name is the order wanted.
    parts = _pick(rows, np.argsort(names, kind="stable"), rows.dtype)
    return Guests(ids, parts.reshape(len(ids), parts.shape[1] * delivery.parts)[:, : departed.width])
