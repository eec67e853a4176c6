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

from luffy.comm import Codec, arrive, depart
from luffy.exchange.condense import Condensed
from luffy.exchange.copies import Copies, ExpertMap
from luffy.exchange.stage import Stage
from luffy.exchange.wire import AS_THEY_ARE, WireCodecs


@dataclass(frozen=True)
class Received:
    """What the experts of this rank get to see: own rows first, then by source rank.

    rows: [R, D] of the stream. expert_ids: int64 [R, K], -1 for dropped choices; ids of experts elsewhere are among
    them. weights: [R, K]. Where a copy is a pair, K is 1 here. copies: this rank's own, which know how many came from
    where. global_token: int64 [R], set where sequences may move.

    Set where tokens are condensed: shared, bool [R, K], choices that are answered with weight one. audit: int64 [R],
    from an audited row to the row that would have represented it, in rows, 0 for all others; None without audits.
    """

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor
    copies: Copies
    global_token: Tensor | None = None
    shared: Tensor | None = None
    audit: Tensor | None = None

    def source_for(self, experts: ExpertMap) -> Tensor | None:
        """The rank that each row came from, int64 [R], where who serves a choice depends on it; else None."""
        if experts.guests is None:
            return None
        mesh, splits = self.copies.exchange.comm.mesh, self.copies.exchange.output_splits
        ranks = torch.tensor([mesh.ep_rank, *range(mesh.ep_size)])
        counts = torch.tensor([self.copies.num_local, *splits])
        return torch.repeat_interleave(ranks, counts).to(self.rows.device)


# Marks a shared choice beside its expert id: ids fit in 14 bits, and 16,383 experts are more than anyone trains.
_SHARED = 1 << 14


def dispatch(
    hidden: Tensor,
    topk_expert_ids: Tensor,
    topk_weights: Tensor,
    copies: Copies,
    per: str,
    *,
    rows: Tensor | None = None,
    condensed: Condensed | None = None,
    global_token: Tensor | None = None,
    wire: WireCodecs = AS_THEY_ARE,
    meanwhile: Callable[[], None] | None = None,
) -> Stage[Received]:
    """hidden [T, D], ids and weights [T, K] -> the rows that this rank's experts serve.

    rows: [C, D] to send in place of the copies' tokens. condensed: what became of the copies; `copies` are those that
    travel. global_token: int64 [T], sent along where sequences may move. wire: how rows are written on the wire, and
    their gradients. meanwhile: host work while the rows travel.
    """
    choices = topk_expert_ids
    if condensed is not None:
        choices = choices.masked_fill(condensed.copy & ~condensed.sent, -1) + condensed.shared * _SHARED
        topk_weights = topk_weights.masked_fill(condensed.shared, 1.0)
    if per == "pairs":  # such a copy serves one choice, and need not tell of the others: K becomes 1
        ids, weights = (t.reshape(-1, 1).index_select(0, copies.flat) for t in (choices, topk_weights))
    else:
        ids, weights = (t.index_select(0, copies.token) for t in (choices, topk_weights))  # [C, K]
    n, num_away = copies.num_local, len(copies.flat) - copies.num_local
    codecs: tuple[Codec | None, Codec | None]
    if rows is None and wire.coded:  # gathered by what encodes them
        own, away = hidden.index_select(0, copies.token[:n]), hidden
        codecs = wire.gathering(copies.token[n:], hidden.shape[0])
    else:
        rows = hidden.index_select(0, copies.token) if rows is None else rows
        own, away = rows.split([n, num_away])
        codecs = wire.plain
    columns = [ids.to(torch.int16), weights]
    if condensed is not None and condensed.scheme.audits:
        columns.append(_audit_offsets(copies, condensed))
    if global_token is not None:
        columns.append(global_token[copies.token].to(torch.int32))
    columns_here, columns_away = zip(*(c.split([n, num_away]) for c in columns), strict=True)
    under_way = depart(
        [away, *columns_away],
        copies.exchange,
        directions=("dispatch", *("control",) * len(columns)),
        backward_directions=("dispatch_backward", *("control",) * len(columns)),
        codecs=(codecs, *((None, None),) * len(columns)),
        meanwhile=meanwhile,
    )
    yield
    remote = arrive(under_way)
    here = [wire.staying(own), *columns_here]
    rows, ids, weights, *rest = (torch.cat([c, r]) for c, r in zip(here, remote, strict=True))
    ids, tokens = ids.long(), None if global_token is None else rest[-1].long()
    if condensed is None:
        return Received(rows, ids, weights, copies, tokens)
    shared = ids >= _SHARED
    audit = rest[0].long() if condensed.scheme.audits else None
    return Received(rows, ids - shared * _SHARED, weights, copies, tokens, shared, audit)


def _audit_offsets(copies: Copies, condensed: Condensed) -> Tensor:
    """From each copy to the one it is audited against, both bound for one rank and so in one order there: int32 [C]."""
    against = condensed.audited.flatten()[copies.flat]
    place = copies.places(condensed.audited.numel())
    here = torch.arange(len(against), device=against.device)
    return torch.where(against >= 0, place[against.clamp_min(0)] - here, 0).to(torch.int32)
