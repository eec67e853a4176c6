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

import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.comm import Comm, RowExchange


@dataclass(frozen=True)
class ExpertMap:
    """Where experts live: expert e fills slot `slot_of_expert[e]`; rank r owns slots [r * n, (r+1) * n)."""

    slot_of_expert: Tensor
    num_local_experts: int

    def rank_of(self, expert_ids: Tensor) -> Tensor:
        """Owning EP rank of each expert id; -1 for id -1."""
        slot = self.slot_of_expert[expert_ids.clamp_min(0)]
        return torch.where(expert_ids < 0, -1, slot // self.num_local_experts)

    def local_slot(self, expert_ids: Tensor, rank: int) -> Tensor:
        """Index among `rank`'s own experts, `num_local_experts` for experts that are elsewhere or id -1."""
        slot = self.slot_of_expert[expert_ids.clamp_min(0)] - rank * self.num_local_experts
        here = (expert_ids >= 0) & (slot >= 0) & (slot < self.num_local_experts)
        return torch.where(here, slot, self.num_local_experts)


@dataclass(frozen=True)
class CopyKeys:
    """Sortable keys of all possible copies, int64 [T * K]; `is_copy` marks real ones, `rank` their destination."""

    keys: Tensor
    is_copy: Tensor
    rank: Tensor


def copy_keys(topk_expert_ids: Tensor, experts: ExpertMap, ep_rank: int, ep_size: int, per: str) -> CopyKeys:
    """Decide the copies of [T, K] choices. `per` is "ranks" (deduplicated) or "pairs"."""
    T, K = topk_expert_ids.shape
    rank = experts.rank_of(topk_expert_ids)  # [T, K]
    is_copy = rank >= 0
    if per == "ranks":
        for k in range(1, K):  # a later choice on a rank that an earlier one already pays for
            is_copy[:, k] &= (rank[:, :k] != rank[:, k : k + 1]).all(1)
    order = torch.where(rank == ep_rank, 0, rank + 1)  # own copies first, then by rank
    flat = torch.arange(T * K, device=rank.device).unflatten(0, (T, K))
    keys = torch.where(is_copy, order * (T * K) + flat, (ep_size + 1) * T * K)
    return CopyKeys(keys.flatten(), is_copy, rank)


@dataclass(frozen=True)
class Copies:
    """The rows that leave this rank's tokens.

    token: int64 [C], row in the batch; own copies first, then by destination rank, then by token.
    slot: int64 [C], which of the token's K choices the copy stands for (its first on that rank).
    num_local: copies that stay. exchange: split sizes for the others.
    num_pairs: (row, expert) pairs this rank's experts will compute, from all sources.
    """

    token: Tensor
    slot: Tensor
    num_local: int
    exchange: RowExchange
    num_pairs: int
    top_k: int

    @property
    def flat(self) -> Tensor:
        """token * K + slot, the name of each copy among all that are possible: int64 [C]."""
        return self.token * self.top_k + self.slot

    def places(self, num_possible: int) -> Tensor:
        """Where each possible copy stands among these, C for those that are not: int64 [num_possible]."""
        place = torch.full((num_possible,), len(self.token), dtype=torch.int64, device=self.token.device)
        place[self.flat] = torch.arange(len(self.token), device=self.token.device)
        return place


def exchange_counts(
    keys: CopyKeys, topk_expert_ids: Tensor, comm: Comm, per_sequence: Tensor | None = None
) -> tuple[Copies, Tensor]:
    """Tell every rank how many copies go where: one small all-gather, one read-back to the host.

    per_sequence: optional int64 [S_max, W >= N] of what the planner wants to know, gathered along.
    Returns the copies, and `per_sequence` of all ranks on the host, int64 [N, S_max, W].
    """
    mesh = comm.mesh
    K = topk_expert_ids.shape[1]
    rank = keys.rank.flatten().clamp_min(0)
    by_rank = torch.zeros(2, mesh.ep_size, dtype=torch.int64, device=rank.device)
    by_rank[0].index_add_(0, rank, keys.is_copy.flatten().long())
    by_rank[1].index_add_(0, rank, (keys.rank >= 0).flatten().long())
    mine = by_rank
    if per_sequence is not None:
        mine = torch.cat([F.pad(by_rank, (0, per_sequence.shape[1] - mesh.ep_size)), per_sequence])
    gathered = comm.all_gather_ep(mine.to(torch.int32)).cpu().to(torch.int64)
    me = mesh.ep_rank
    out = gathered[me, 0, : mesh.ep_size].tolist()
    into = gathered[:, 0, me].tolist()
    num_local, num_copies = out[me], sum(out)
    out[me] = into[me] = 0
    index = keys.keys.sort().values[:num_copies] % max(topk_expert_ids.numel(), 1)
    copies = Copies(
        token=index // K,
        slot=index % K,
        num_local=num_local,
        exchange=RowExchange(comm, tuple(out), tuple(into)),
        num_pairs=int(gathered[:, 1, me].sum()),
        top_k=K,
    )
    return copies, gathered[:, 2:]
