"""Shared answers: what is sent for several copies, and how each takes its part of the answer.

An answer that is shared came back unweighted. Every copy that it serves adds it to its token with the token's own gate
weight, the one that was sent included. LSH-MoE also adds what the sent row differs by: Y = E(c) + (x - c).
"""

from __future__ import annotations

import torch
from torch import Tensor

from luffy.exchange.combine import return_rows
from luffy.exchange.condense import Condensed
from luffy.exchange.copies import Copies
from luffy.exchange.stage import Stage
from luffy.exchange.wire import AS_THEY_ARE, WireCodecs


def rows_to_send(x: Tensor, copies: Copies, condensed: Condensed) -> Tensor:
    """x [T, D] -> the rows that travel, [C, D]: of one token each, or the mean of all that a row stands for."""
    rows, scheme = x.index_select(0, copies.token), condensed.scheme
    if scheme.representative == "member" and scheme.gradient == "exact":
        return rows
    wide = torch.promote_types(x.dtype, torch.float32)
    C, (T, K) = len(copies.token), condensed.leader.shape
    place = copies.places(T * K)[condensed.leader]  # [T, K]
    place = torch.where(condensed.copy, place, C)
    total = torch.zeros(C + 1, x.shape[1], dtype=wide, device=x.device)
    count = torch.zeros(C + 1, dtype=wide, device=x.device)
    for k in range(K):
        total = total.index_add(0, place[:, k], x.to(wide))
        count = count.index_add(0, place[:, k], torch.ones_like(x[:, 0], dtype=wide))
    mean = (total[:C] / count[:C, None]).to(x.dtype)
    if scheme.representative == "centroid":
        return mean
    return rows.detach() + (mean - mean.detach())  # forward the member, backward the mean


def take_shared(out: Tensor, answers: Tensor, place: Tensor, takes: Tensor, weights: Tensor) -> Tensor:
    """out [T, D] plus weights[t, k] * answers[place[t, k]] over k where takes[t, k]."""
    if not len(answers):  # weights and answers stay in the graph: other ranks wait for their gradients
        answers = answers.new_zeros(1, answers.shape[1])
    # Whoever takes nothing takes some row zero times. Spread over all rows: were it one and the same, the backward
    # pass would add T gradients of nothing into it, one after the other.
    own = torch.arange(place.shape[0], device=place.device) % len(answers)
    row = torch.where(takes, place, own[:, None])  # [T, K]
    weight = weights.to(out.dtype) * takes
    for r, w in zip(row.unbind(1), weight.split(1, dim=1), strict=True):
        out = out + w * answers.index_select(0, r).to(out.dtype)
    return out


def combine_condensed(
    hidden: Tensor,
    partial: Tensor,
    copies: Copies,
    condensed: Condensed,
    weights: Tensor,
    wire: WireCodecs = AS_THEY_ARE,
    correct: tuple[Tensor, Tensor] | None = None,
) -> Stage[Tensor]:
    """`combine` where some answers are shared: the new stream, [T, D]. weights [T, K].

    correct: (x [T, D], rows that travelled [C, D]); what shares an answer adds x - c to it. None: no correction.
    Where rows are coded, c is the row before it was: an answer E(c + e) to a rounded row is off by what the expert
    makes of e, and a correction by x - (c + e) would write e itself into the stream beside it.
    """
    rows = yield from return_rows(partial, copies, wire)  # [C, D]
    wide = torch.promote_types(hidden.dtype, torch.float32)
    shared = condensed.shared.flatten()[copies.flat]
    out = hidden.to(wide).index_add(0, copies.token, rows.masked_fill(shared[:, None], 0).to(wide))
    takes, answers = condensed.takes_shared, rows
    if correct is not None:
        x, sent = correct
        answers = rows.to(wide) - sent.to(wide)
        out = out + (weights * takes).sum(1, keepdim=True).to(wide) * x.to(wide)
    out = take_shared(out, answers, copies.places(takes.numel())[condensed.leader], takes, weights)
    return out.to(hidden.dtype)
