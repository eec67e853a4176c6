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

from luffy.comm import Codec, all_to_all_rows
from luffy.exchange.copies import Copies


@dataclass(frozen=True)
class Received:
    """What the experts of this rank get to see: own rows first, then by source rank.

    rows: [R, D] of the stream. expert_ids: int64 [R, K], -1 for dropped choices; ids of experts elsewhere are among
    them. weights: [R, K]. Where a copy is a pair, K is 1 here. global_token: int64 [R], set where sequences may move.
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
    wire: tuple[Codec | None, Codec | None] = (None, None),
    meanwhile: Callable[[], None] | None = None,
) -> Received:
    """hidden [T, D], ids and weights [T, K] -> the rows that this rank's experts serve.

    global_token: int64 [T], sent along where sequences may move. wire: how rows are written on the wire, and
    their gradients. meanwhile: host work while the rows travel.
    """
    ids, weights = topk_expert_ids[copies.token], topk_weights[copies.token]  # [C, K]
    if per == "pairs":  # such a copy serves one choice, and need not tell of the others: K becomes 1
        ids, weights = (t.gather(1, copies.slot[:, None]) for t in (ids, weights))
    # Expert ids fit in 16 bits: 32,767 experts are more than anyone trains.
    columns = [hidden[copies.token], ids.to(torch.int16), weights]
    if global_token is not None:
        columns.append(global_token[copies.token].to(torch.int32))
    n = copies.num_local
    remote = all_to_all_rows(
        [c[n:] for c in columns],
        copies.exchange,
        directions=("dispatch", *("control",) * (len(columns) - 1)),
        backward_directions=("dispatch_backward", *("control",) * (len(columns) - 1)),
        codecs=(wire, *((None, None),) * (len(columns) - 1)),
        meanwhile=meanwhile,
    )
    rows, ids, weights, *tokens = (torch.cat([c[:n], r]) for c, r in zip(columns, remote, strict=True))
    return Received(rows, ids.long(), weights, tokens[0].long() if tokens else None)
