"""Permute: the choices that a rank's experts serve, in the order of those experts.

A received row may serve several experts of this rank, a (row, expert) pair each. What multiplies, weights and adds up
by these pairs is luffy.model.experts.
"""

from __future__ import annotations

from torch import Tensor

from luffy.exchange.copies import ExpertMap
from luffy.kernels.sort import Pairs, sort_by_group


def pairs_by_expert(
    expert_ids: Tensor,
    experts: ExpertMap,
    ep_rank: int,
    num_pairs: int | None = None,
    source: Tensor | None = None,
) -> Pairs:
    """expert_ids: integers [R, K] of received rows, from ranks `source`, int64 [R] (None: it does not matter).

    num_pairs: as the counts say, if they are known: nothing is read back.
    """
    if experts.guests is not None:
        local = experts.local_slot(expert_ids.long(), ep_rank, source)
        return sort_by_group(local, experts.num_resident, num_pairs)
    first = ep_rank * experts.num_local_experts
    return sort_by_group(expert_ids, experts.num_resident, num_pairs, lookup=experts.slot_of_expert, first=first)
