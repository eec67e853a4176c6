"""Combine: partial sums back to the rank of the token's sequence, added to its residual."""

from __future__ import annotations

import torch
from torch import Tensor

from luffy.comm import Codec, arrive, depart
from luffy.exchange.copies import Copies
from luffy.exchange.stage import Stage


def return_rows(
    partial: Tensor, copies: Copies, wire: tuple[Codec | None, Codec | None] = (None, None)
) -> Stage[Tensor]:
    """partial [R, D] of this rank's experts -> the answers to this rank's own copies, [C, D], in their order.

    wire: how partial sums are written on the wire, and their gradients. Rows return in the order in which dispatch
    sent them, so their tokens are known without being told.
    """
    n = copies.num_local
    under_way = depart(
        [partial[n:]],
        copies.exchange.reversed(),
        directions=("combine",),
        backward_directions=("combine_backward",),
        codecs=(wire,),
    )
    yield
    (remote,) = arrive(under_way)
    return torch.cat([partial[:n], remote])


def combine(
    hidden: Tensor, partial: Tensor, copies: Copies, wire: tuple[Codec | None, Codec | None] = (None, None)
) -> Stage[Tensor]:
    """hidden [T, D] (the residual), partial [R, D] from this rank's experts -> new stream [T, D]."""
    rows = yield from return_rows(partial, copies, wire)
    # Up to K partial sums meet in a token; adding them in bfloat16 would round K times.
    wide = torch.promote_types(hidden.dtype, torch.float32)
    return hidden.to(wide).index_add(0, copies.token, rows.to(wide)).to(hidden.dtype)
