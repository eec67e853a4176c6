"""Dispatch: rows of the residual stream to the ranks of their experts.

The row sent is h_t, the stream *before* the layer's norm. The receiver applies the norm, whose weights every rank
has; so a sequence that moves finds its residual already there. Along with each row travel the ids and the weights of
the token's experts, in the same message.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from luffy.comm import all_to_all_rows
from luffy.exchange.copies import Copies


@dataclass(frozen=True)
class Received:
    """What the experts of this rank get to see: own rows first, then by source rank.

    rows: [R, D] of the stream. expert_ids: int64 [R, K], -1 for choices this copy does not serve.
    weights: [R, K]. global_token: int64 [R], set where sequences may move.
    """

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor
    global_token: Tensor | None = None


def dispatch(
    hidden: Tensor,
    topk_expert_ids: Tensor,
    topk_weights: Tensor,
    copies: Copies,
    per: str,
    *,
    global_token: Tensor | None = None,
    meanwhile: Callable[[], None] | None = None,
) -> Received:
    """hidden [T, D], ids and weights [T, K] -> the rows that this rank's experts serve.

    global_token: int64 [T], sent along where sequences may move. meanwhile: host work while the rows travel.
    """
    ids = topk_expert_ids[copies.token]
    if per == "pairs":
        only = torch.arange(ids.shape[1], device=ids.device) == copies.slot[:, None]
        ids = ids.masked_fill(~only, -1)
    # Expert ids fit in 16 bits: 32,767 experts are more than anyone trains.
    columns = [hidden[copies.token], ids.to(torch.int16), topk_weights[copies.token]]
    if global_token is not None:
        columns.append(global_token[copies.token].to(torch.int32))
    n = copies.num_local
    remote = all_to_all_rows(
        [c[n:] for c in columns],
        copies.exchange,
        directions=("dispatch", *("control",) * (len(columns) - 1)),
        backward_directions=("dispatch_backward", *("control",) * (len(columns) - 1)),
        meanwhile=meanwhile,
    )
    rows, ids, weights, *tokens = (torch.cat([c[:n], r]) for c, r in zip(columns, remote, strict=True))
    return Received(rows, ids.long(), weights, tokens[0].long() if tokens else None)
