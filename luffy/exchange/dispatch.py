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
from luffy.exchange.copies import Copies
from luffy.exchange.stage import Stage
from luffy.exchange.wire import AS_THEY_ARE, WireCodecs


@dataclass(frozen=True)
class Received:
    """What the experts of this rank get to see: own rows first, then by source rank.

    rows: [R, D] of the stream. expert_ids: int64 [R, K], -1 for dropped choices; ids of experts elsewhere are among
    them. weights: [R, K]. Where a copy is a pair, K is 1 here. source: int64 [R], the rank that each row came from.
    global_token: int64 [R], set where sequences may move.

    Set where tokens are condensed: shared, bool [R, K], choices that are answered with weight one. audit: int64 [R],
    from an audited row to the row that would have represented it, in rows, 0 for all others; None without audits.
    """

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor
    source: Tensor
    global_token: Tensor | None = None
    shared: Tensor | None = None
    audit: Tensor | None = None


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
    ids, weights = choices[copies.token], topk_weights[copies.token]  # [C, K]
    if per == "pairs":  # such a copy serves one choice, and need not tell of the others: K becomes 1
        ids, weights = (t.gather(1, copies.slot[:, None]) for t in (ids, weights))
    n = copies.num_local
    codecs: tuple[Codec | None, Codec | None]
    if rows is None and wire.coded:  # gathered by what encodes them
        own, away, codecs = hidden[copies.token[:n]], hidden, wire.gathering(copies.token[n:], hidden.shape[0])
    else:
        rows = hidden[copies.token] if rows is None else rows
        own, away, codecs = rows[:n], rows[n:], wire.plain
    columns = [ids.to(torch.int16), weights]
    if condensed is not None and condensed.scheme.audits:
        columns.append(_audit_offsets(copies, condensed))
    if global_token is not None:
        columns.append(global_token[copies.token].to(torch.int32))
    under_way = depart(
        [away, *(c[n:] for c in columns)],
        copies.exchange,
        directions=("dispatch", *("control",) * len(columns)),
        backward_directions=("dispatch_backward", *("control",) * len(columns)),
        codecs=(codecs, *((None, None),) * len(columns)),
        meanwhile=meanwhile,
    )
    yield
    remote = arrive(under_way)
    here = [wire.staying(own), *(c[:n] for c in columns)]
    rows, ids, weights, *rest = (torch.cat([c, r]) for c, r in zip(here, remote, strict=True))
    ids, tokens = ids.long(), None if global_token is None else rest[-1].long()
    source = _sources(copies, rows.device)
    if condensed is None:
        return Received(rows, ids, weights, source, tokens)
    shared = ids >= _SHARED
    audit = rest[0].long() if condensed.scheme.audits else None
    return Received(rows, ids - shared * _SHARED, weights, source, tokens, shared, audit)


def _sources(copies: Copies, device: torch.device) -> Tensor:
    """The rank of each received row: own ones first, then by source. int64 [R]."""
    mesh, splits = copies.exchange.comm.mesh, copies.exchange.output_splits
    ranks = torch.tensor([mesh.ep_rank, *range(mesh.ep_size)])
    counts = torch.tensor([copies.num_local, *splits])
    return torch.repeat_interleave(ranks, counts).to(device)


def _audit_offsets(copies: Copies, condensed: Condensed) -> Tensor:
    """From each copy to the one it is audited against, both bound for one rank and so in one order there: int32 [C]."""
    against = condensed.audited.flatten()[copies.flat]
    place = copies.places(condensed.audited.numel())
    here = torch.arange(len(against), device=against.device)
    return torch.where(against >= 0, place[against.clamp_min(0)] - here, 0).to(torch.int32)
