"""Sequence migration: answers go to where a sequence will live, and the sequence is rebuilt there.

Without migration a token's partial sums return to the rank that sent the token. With it they go to the sequence's new
home b. Its residual is not sent from the old home: dispatch already brought h_t, un-normed, to every rank with an
expert of the token, and one of those ranks, the *carrier*, adds it to its partial sum. The carrier is b itself where b
holds one of the token's experts (then the residual never travels again), else the rank of the token's first expert.
A token whose choices were all dropped by capacity reached no rank; its residual is the one row that travels from the
old home (an *orphan*).

The plan is known to all ranks, so all split sizes are: rank r returns counts[s, r] rows of sequence s to its new home.
What a receiver must be told is which token each row belongs to: one int32 a row.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm, RowExchange, all_to_all_rows
from luffy.data.batch import Layout, SequenceTable
from luffy.exchange.copies import CopyKeys, ExpertMap
from luffy.exchange.dispatch import Received


def counts_per_sequence(keys: CopyKeys, layout: Layout, num_ranks: int, num_rows: int) -> Tensor:
    """Copies of each local sequence by rank, and its orphans in the last column: int64 [num_rows, num_ranks + 1].

    `num_rows` is the largest number of sequences on any rank, so that all ranks gather the same shape.
    """
    out = torch.zeros(num_rows, num_ranks + 1, dtype=torch.int64, device=keys.rank.device)
    cell = layout.sequence_of_token[:, None] * (num_ranks + 1) + keys.rank.clamp_min(0)  # [T, K]
    out.view(-1).index_add_(0, cell.flatten(), keys.is_copy.flatten().long())
    orphan = ~keys.is_copy.any(1)
    out[:, num_ranks].index_add_(0, layout.sequence_of_token, orphan.long())
    return out


def rows_at_favourite(keys: CopyKeys, layout: Layout, num_ranks: int) -> Tensor:
    """int64 [2]: copies of the local sequences, and those that go to their sequence's most wanted rank."""
    counts = counts_per_sequence(keys, layout, num_ranks, layout.num_sequences)[:, :num_ranks]
    return torch.stack([counts.sum(), counts.amax(1).sum()])


def by_table(gathered: np.ndarray, table: SequenceTable) -> np.ndarray:
    """[ranks, rows per rank, n] as gathered -> [S, n] in the order of the sequence table."""
    out = np.zeros((len(table.lengths), gathered.shape[2]), dtype=np.int64)
    for rank in range(gathered.shape[0]):
        mine = table.sequences_of(rank)
        out[mine] = gathered[rank, : len(mine)]
    return out


@dataclass(frozen=True)
class Migration:
    """One layer's move from `old` to `new`, as one rank executes it.

    counts: int64 [S, N] rows of each sequence at each rank. orphans: int64 [S] tokens without any row.
    """

    old: Layout
    new: Layout
    counts: np.ndarray
    orphans: np.ndarray

    @property
    def moved(self) -> np.ndarray:
        """Whether each sequence changes its rank, bool [S]."""
        return self.old.table.home_rank != self.new.table.home_rank

    def exchange(self, comm: Comm) -> RowExchange:
        """Split sizes of the combine: rows of this rank by new home, and rows for this rank by where they were."""
        me, N = comm.mesh.ep_rank, comm.mesh.ep_size
        home, away = self.new.table.home_rank, np.where(self.moved, self.orphans, 0)
        send = np.zeros(N, dtype=np.int64)
        np.add.at(send, home, self.counts[:, me])
        np.add.at(send, home, np.where(self.old.table.home_rank == me, away, 0))
        receive = self.counts[home == me].sum(0)
        np.add.at(receive, self.old.table.home_rank[home == me], away[home == me])
        send[me] = receive[me] = 0
        return RowExchange(comm, tuple(int(n) for n in send), tuple(int(n) for n in receive))

    def _device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.old.device, torch.int64, non_blocking=True)

    def place_of(self, global_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, new home, row at the new home) of tokens by global id; int64, shaped as `global_token`."""
        table, new_table = self.old.table, self.new.table
        first = self._device(table.first_token)
        # The last sequence that begins at or before the token; an empty sequence shares its first id with the next
        # one, which `right` passes over.
        sequence = torch.searchsorted(first, global_token, right=True) - 1
        start = np.zeros(len(table.lengths), dtype=np.int64)
        for rank in range(int(new_table.home_rank.max(initial=0)) + 1):
            here = new_table.sequences_of(rank)
            start[here] = np.cumsum(table.lengths[here]) - table.lengths[here]
        row = global_token - first[sequence] + self._device(start)[sequence]
        return sequence, self._device(new_table.home_rank)[sequence], row

    def stayed_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of this rank's tokens that stay: (row before, row after), int64 each."""
        keep = [(i, s) for i, s in enumerate(self.old.sequences) if self.new.table.home_rank[s] == self.new.rank]
        after = {int(s): i for i, s in enumerate(self.new.sequences)}
        empty = np.zeros(0, dtype=np.int64)
        lengths = self.old.table.lengths
        before_rows = [self.old.starts[i] + np.arange(lengths[s]) for i, s in keep]
        after_rows = [self.new.starts[after[int(s)]] + np.arange(lengths[s]) for _, s in keep]
        return self._device(np.concatenate([empty, *before_rows])), self._device(np.concatenate([empty, *after_rows]))


def carries_residual(received: Received, migration: Migration, experts: ExpertMap, ep_rank: int) -> Tensor:
    """Whether this rank adds the residual for each received row: bool [R]."""
    assert received.global_token is not None
    sequence, new_home, _ = migration.place_of(received.global_token)
    moved = migration._device(migration.moved)[sequence].bool()
    ranks = experts.rank_of(received.expert_ids)  # [R, K], -1 where capacity dropped
    home_has_it = (ranks == new_home[:, None]).any(1)
    first = ranks.gather(1, (ranks >= 0).to(torch.int8).argmax(1, keepdim=True)).squeeze(1)
    carrier = torch.where(home_has_it, new_home, first)
    return moved & (carrier == ep_rank)


def combine_at_new_home(
    hidden: Tensor,
    partial: Tensor,
    received: Received,
    migration: Migration,
    comm: Comm,
    base: Callable[[Tensor], Tensor],
    orphan_tokens: Tensor | None,
) -> Tensor:
    """Partial sums (residuals already added by their carriers) to the new homes: the stream there, [T_new, D].

    hidden [T, D]: the stream at the old home. partial [R, D]. base(h): what a token has besides its routed experts,
    h itself plus shared experts; applied here to tokens that stay, and to orphans. orphan_tokens: int64, rows of
    `hidden` that reached no rank and whose sequence moves; None where there cannot be any.
    """
    assert received.global_token is not None
    me = comm.mesh.ep_rank
    tokens, rows = received.global_token, partial
    if orphan_tokens is not None:
        tokens = torch.cat([tokens, migration.old.global_token[orphan_tokens]])
        rows = torch.cat([rows, base(hidden[orphan_tokens])])
    _, new_home, slot = migration.place_of(tokens)
    order = torch.where(new_home == me, 0, new_home + 1)
    by_home = torch.argsort(order, stable=True)
    exchange = migration.exchange(comm)
    num_local = rows.shape[0] - sum(exchange.input_splits)
    rows, slot = rows[by_home], slot[by_home].to(torch.int32)
    remote, remote_slot = all_to_all_rows(
        [rows[num_local:], slot[num_local:]],
        exchange,
        directions=("combine", "control"),
        backward_directions=("combine_backward", "control"),
    )
    before, after = migration.stayed_rows()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.zeros(migration.new.num_tokens, hidden.shape[1], dtype=wide, device=hidden.device)
    out = out.index_add(0, after, base(hidden[before]).to(wide))
    out = out.index_add(0, slot[:num_local].long(), rows[:num_local].to(wide))
    return out.index_add(0, remote_slot.long(), remote.to(wide)).to(hidden.dtype)


def transfer(columns: list[Tensor], old: Layout, new: Layout, comm: Comm, direction: str) -> list[Tensor]:
    """Per-token tensors [T_old, ...] from the ranks of `old` to those of `new`: what follows a sequence (labels).

    Both layouts are of the same table of sequences; nothing but the columns is sent.
    """
    me, N, lengths = comm.mesh.ep_rank, comm.mesh.ep_size, old.table.lengths
    old_home, new_home = old.table.home_rank, new.table.home_rank
    send = np.bincount(new_home[old_home == me], lengths[old_home == me], minlength=N).astype(np.int64)
    receive = np.bincount(old_home[new_home == me], lengths[new_home == me], minlength=N).astype(np.int64)

    def rows(layout: Layout, other_home: np.ndarray) -> Tensor:
        """Rows of `layout` ordered by the other side's rank, then by sequence."""
        local = layout.sequences
        order = np.argsort(other_home[local], kind="stable")
        parts = [layout.starts[i] + np.arange(lengths[local[i]]) for i in order]
        joined = np.concatenate([np.zeros(0, dtype=np.int64), *parts])
        return torch.from_numpy(joined).to(layout.device)

    exchange = RowExchange(comm, tuple(int(n) for n in send), tuple(int(n) for n in receive))
    index = rows(old, new_home)
    names = (direction,) * len(columns)
    arrived = all_to_all_rows([c[index] for c in columns], exchange, directions=names, backward_directions=names)
    back = torch.argsort(rows(new, old_home))
    return [a[back] for a in arrived]
