"""Shared answers: what is sent for several copies, and how each takes its part of the answer.

An answer that is shared came back unweighted. Every copy that it serves adds it to its token with the token's own gate
weight, the one that was sent included. LSH-MoE also adds what the sent row differs by: Y = E(c) + (x - c).
"""

from __future__ import annotations

import torch
from torch import Tensor

from luffy.exchange.condense import Condensed
from luffy.exchange.copies import Copies


def rows_to_send(x: Tensor, copies: Copies, condensed: Condensed) -> Tensor:
    """x [T, D] -> the rows that travel, [C, D]: of one token each, or the mean of all that a row stands for."""
    if condensed.scheme.representative == "member":
        return x.index_select(0, copies.token)
    wide = torch.promote_types(x.dtype, torch.float32)
    C, (T, K) = len(copies.token), condensed.leader.shape
    place = torch.where(condensed.copy, copies.places(T * K)[condensed.leader], C)  # [T, K]
    total = torch.zeros(C + 1, x.shape[1], dtype=wide, device=x.device)
    count = torch.zeros(C + 1, dtype=wide, device=x.device)
    for k in range(K):
        total = total.index_add(0, place[:, k], x.to(wide))
        count = count.index_add(0, place[:, k], torch.ones_like(x[:, 0], dtype=wide))
    return (total[:C] / count[:C, None]).to(x.dtype)


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
