"""Combine: partial sums back to the rank of the token's sequence, added to its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from luffy.comm import arrive, depart
from luffy.exchange.copies import Copies
from luffy.exchange.stage import Stage
from luffy.exchange.wire import AS_THEY_ARE, WireCodecs


def return_rows(partial: Tensor, copies: Copies, wire: WireCodecs = AS_THEY_ARE) -> Stage[Tensor]:
    """partial [R, D] of this rank's experts -> the answers to this rank's own copies, [C, D], in their order.

    wire: how partial sums are written on the wire, and their gradients. Rows return in the order in which dispatch
    sent them, so their tokens are known without being told.
    """
    n = copies.num_local
    own, away = partial.split([n, partial.shape[0] - n])
    under_way = depart(
        [away],
        copies.exchange.reversed(),
        directions=("combine",),
        backward_directions=("combine_backward",),
        codecs=(wire.plain,),
    )
    yield
    (remote,) = arrive(under_way)
    return torch.cat([wire.staying(own), remote])


def combine(hidden: Tensor, partial: Tensor, copies: Copies, wire: WireCodecs = AS_THEY_ARE) -> Stage[Tensor]:
    """hidden [T, D] (the residual), partial [R, D] from this rank's experts -> new stream [T, D]."""
    if wire.coded:
        return (yield from _combine_coded(hidden, partial, copies, wire))
    rows = yield from return_rows(partial, copies)
    # Up to K partial sums meet in a token; adding them in bfloat16 would round K times.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide).index_add(0, copies.token, rows.to(wide)).to(hidden.dtype)


def _combine_coded(hidden: Tensor, partial: Tensor, copies: Copies, wire: WireCodecs) -> Stage[Tensor]:
    """The same, where what decodes the rows adds them up by token."""
    n, T = copies.num_local, hidden.shape[0]
    own, away = partial.split([n, partial.shape[0] - n])
    under_way = depart(
        [away],
        copies.exchange.reversed(),
        directions=("combine",),
        backward_directions=("combine_backward",),
        codecs=(wire.adding(copies.token[n:], T),),
    )
    yield
    (remote,) = arrive(under_way)  # [T, D]
    out = hidden.to(remote.dtype) + remote
    return out.index_add(0, copies.token[:n], wire.staying(own).to(remote.dtype)).to(hidden.dtype)
