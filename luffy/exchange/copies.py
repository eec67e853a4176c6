"""Copies: which rows leave a token, and for which rank.

The router chose K experts a token; the experts live on ranks. With copies per *rank*, a token sends one row to each
rank that owns any of its experts; with copies per *pair* (the classic systems) one row per expert, even when two of
them share a rank. This is the only place where the two differ: downstream a copy is a row and the experts it serves.

Copies are ordered: those that stay on this rank first (they never enter the network), then by destination rank, then
by token. The receiver keeps the same convention, so no order has to be sent.

One read-back from the device is needed, the split sizes; all other shapes follow from it (`exchange_counts`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.comm import Comm, RowExchange
from luffy.kernels.sort import Pairs, sort_by_group


@dataclass(frozen=True)
class GuestMap:
    """Which ranks hold experts of others (luffy.plan.residency).

    resident: bool [E, N]. place: int64 [E], place of each expert among this rank's guests, of which there are `num`.
    """

    resident: Tensor
    place: Tensor
    num: int


@dataclass(frozen=True)
class ExpertMap:
    """Where experts live: expert e fills slot `slot_of_expert[e]`; rank r owns slots [r * n, (r+1) * n).

    guests: experts that ranks hold besides, None for none. A choice is then served at the token's home if that holds
    the expert, so methods ask for `source`: the home of all tokens, or of each row (int64 [R]). serves_all: every rank
    holds whatever its tokens chose, so that no row travels.
    """

    slot_of_expert: Tensor
    num_local_experts: int
    guests: GuestMap | None = None
    serves_all: bool = False

    @property
    def num_resident(self) -> int:
        """Experts that this rank holds: its own, and then its guests."""
        return self.num_local_experts + (0 if self.guests is None else self.guests.num)

    def rank_of(self, expert_ids: Tensor, source: int | Tensor | None = None) -> Tensor:
        """EP rank that serves each of the choices [R, K]; -1 for id -1."""
        known = expert_ids.clamp_min(0)
        rank = self.slot_of_expert[known] // self.num_local_experts
        if self.guests is not None:
            assert source is not None, "with guests, who serves a choice depends on where it is made"
            home = source[:, None] if isinstance(source, Tensor) else torch.full_like(known, source)
            rank = torch.where(self.guests.resident[known, home], home, rank)
        return torch.where(expert_ids < 0, -1, rank)

    def local_slot(self, expert_ids: Tensor, rank: int, source: int | Tensor | None = None) -> Tensor:
        """Index among the experts that `rank`, this one, holds; `num_resident` for choices it does not serve."""
        slot = self.slot_of_expert[expert_ids.clamp_min(0)] - rank * self.num_local_experts
        own = (slot >= 0) & (slot < self.num_local_experts)
        if self.guests is not None:
            slot = torch.where(own, slot, self.num_local_experts + self.guests.place[expert_ids.clamp_min(0)])
        here = own & (expert_ids >= 0) if self.guests is None else self.rank_of(expert_ids, source) == rank
        return torch.where(here, slot, self.num_resident)


@dataclass(frozen=True)
class CopyKeys:
    """All possible copies [T, K]: `is_copy` (bool) marks real ones; `rank` (int64) serves the choice, -1 for none."""

    is_copy: Tensor
    rank: Tensor


def copy_keys(topk_expert_ids: Tensor, experts: ExpertMap, ep_rank: int, per: str) -> CopyKeys:
    """Decide the copies of [T, K] choices. `per` is "ranks" (deduplicated) or "pairs"."""
    K = topk_expert_ids.shape[1]
    rank = experts.rank_of(topk_expert_ids, ep_rank)  # [T, K]
    is_copy = rank >= 0
    if per == "ranks":
        for k in range(1, K):  # a later choice on a rank that an earlier one already pays for
            is_copy[:, k] &= (rank[:, :k] != rank[:, k : k + 1]).all(1)
    return CopyKeys(is_copy, rank)


def in_order(keys: CopyKeys, ep_rank: int, ep_size: int, num_copies: int) -> Pairs:
    """The copies, own ones first, then by rank, then by token."""
    destination = torch.where(keys.rank == ep_rank, 0, keys.rank + 1)
    return sort_by_group(destination.masked_fill(~keys.is_copy, -1), ep_size + 1, num_copies)


@dataclass(frozen=True)
class Copies:
    """The rows that leave this rank's tokens.

    flat: int64 [C], token * K + slot, the name of each copy among all that are possible; own copies first, then by
    destination rank, then by token. slot: which of the token's K choices it stands for (its first on that rank).
    num_local: copies that stay. exchange: split sizes for the others.
    num_pairs: (row, expert) pairs this rank's experts will compute, from all sources.
    place: int32 [T, K], where each possible copy stands among these, -1 for those that are none.
    """

    flat: Tensor
    num_local: int
    exchange: RowExchange
    num_pairs: int
    top_k: int
    place: Tensor

    @cached_property
    def token(self) -> Tensor:
        """The row of each copy in the batch, int64 [C]."""
        return self.flat // self.top_k

    @cached_property
    def slot(self) -> Tensor:
        """Which of its token's choices each copy stands for, int64 [C]."""
        return self.flat % self.top_k

    def places(self, num_possible: int) -> Tensor:
        """Where each possible copy stands among these, C for those that are not: int64 [num_possible]."""
        assert num_possible == self.place.numel()
        place = self.place.flatten().long()
        return torch.where(place < 0, len(self.flat), place)


def all_local(keys: CopyKeys, topk_expert_ids: Tensor, comm: Comm) -> Copies:
    """The copies where every rank holds whatever its tokens chose: none leaves, and nobody needs to be told."""
    num_copies, num_pairs = torch.stack([keys.is_copy.sum(), (keys.rank >= 0).sum()]).tolist()
    none = (0,) * comm.mesh.ep_size
    exchange = RowExchange(comm, none, none, idle=True)
    return _copies(keys, topk_expert_ids.shape[1], num_copies, num_copies, num_pairs, exchange)


def exchange_counts(
    keys: CopyKeys, topk_expert_ids: Tensor, comm: Comm, per_sequence: Tensor | None = None
) -> tuple[Copies, np.ndarray, np.ndarray]:
    """Tell every rank how many copies go where: one small all-gather, one read-back to the host.

    per_sequence: optional int64 [S_max, W >= N] of what the planner wants to know, gathered along.
    Returns the copies; on the host, int64 each, how many go from each rank to each [N, N], and `per_sequence` of all
    ranks [N, S_max, W].
    """
    mesh = comm.mesh
    rank = keys.rank.flatten().clamp_min(0)
    by_rank = torch.zeros(2, mesh.ep_size, dtype=torch.int64, device=rank.device)
    by_rank[0].index_add_(0, rank, keys.is_copy.flatten().long())
    by_rank[1].index_add_(0, rank, (keys.rank >= 0).flatten().long())
    mine = by_rank
    if per_sequence is not None:
        mine = torch.cat([F.pad(by_rank, (0, per_sequence.shape[1] - mesh.ep_size)), per_sequence])
    gathered = comm.all_gather_ep(mine.to(torch.int32)).cpu().numpy().astype(np.int64)
    counts, me = gathered[:, 0, : mesh.ep_size], mesh.ep_rank
    out, into = counts[me].tolist(), counts[:, me].tolist()
    num_local, num_copies = out[me], sum(out)
    out[me] = into[me] = 0
    exchange, num_pairs = RowExchange(comm, tuple(out), tuple(into)), int(gathered[:, 1, me].sum())
    copies = _copies(keys, topk_expert_ids.shape[1], num_copies, num_local, num_pairs, exchange)
    return copies, counts, gathered[:, 2:]


def _copies(keys: CopyKeys, K: int, num_copies: int, num_local: int, num_pairs: int, exchange: RowExchange) -> Copies:
    mesh = exchange.comm.mesh
    order = in_order(keys, mesh.ep_rank, mesh.ep_size, num_copies)
    return Copies(order.flat.long(), num_local, exchange, num_pairs, K, order.place)
