"""Permute: bring received rows into expert order, and add the experts' answers up again.

A received row may serve several experts of this rank, a (row, expert) pair each. `pairs_by_expert` sorts the pairs by
expert, so that one grouped matrix product serves them all; `weighted_sum` multiplies each answer by its weight and
adds it to its row: the partial sum that goes back is one row however many experts worked on it.

Rows are picked by `index_select`, here and elsewhere, never by x[index]: the gradient of the latter sorts the index.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luffy.exchange.copies import ExpertMap
from luffy.kernels.order import stable_order


@dataclass(frozen=True)
class Pairs:
    """(row, expert) pairs sorted by local expert. row: int64 [P]. flat: int64 [P], row * K + choice.

    num_tokens_per_expert: int64 [n].
    """

    row: Tensor
    flat: Tensor
    num_tokens_per_expert: Tensor


def pairs_by_expert(
    expert_ids: Tensor, experts: ExpertMap, ep_rank: int, num_pairs: int, source: Tensor | None = None
) -> Pairs:
    """expert_ids: int64 [R, K] of received rows, from ranks `source`, int64 [R] (None: it does not matter).

    `num_pairs` is known from the counts, so nothing is read back.
    """
    n, K = experts.num_resident, expert_ids.shape[1]
    local = experts.local_slot(expert_ids, ep_rank, source).flatten()  # [R * K], n = not here
    order = stable_order(local, n + 1)[:num_pairs]
    counts = torch.zeros(n + 1, dtype=torch.int64, device=local.device)
    counts.index_add_(0, local, torch.ones_like(local))
    return Pairs(order // K, order, counts[:n])


def weighted_sum(answers: Tensor, weights: Tensor, pairs: Pairs, num_rows: int) -> Tensor:
    """answers [P, D], weights [R, K] -> partial sums [num_rows, D], added in float32 at least."""
    wide = weights.dtype  # float32, or float64 for a float64 model
    scaled = answers.to(wide) * weights.reshape(-1).index_select(0, pairs.flat)[:, None]
    total = scaled.new_zeros(num_rows, answers.shape[1]).index_add(0, pairs.row, scaled)
    return total.to(answers.dtype)
