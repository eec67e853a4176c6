"""Sequence migration: who moves, what that puts on the wire, and what follows a sequence.

Without migration a token's partial sums return to the rank that sent the token. With it they go to the sequence's new
home (luffy.exchange.rebuild). The plan is known to all ranks, so all split sizes are: rank r returns counts[s, r] rows
of sequence s to its new home, and the old home sends residuals_sent[s, b] residuals to new home b, of the tokens whose
residual no row carries there.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm, RowExchange, all_to_all_rows
from luffy.data.batch import Layout, SequenceTable
from luffy.exchange.copies import CopyKeys


def counts_per_sequence(keys: CopyKeys, layout: Layout, num_ranks: int, num_rows: int) -> Tensor:
    """Copies of each local sequence by rank: int64 [num_rows, num_ranks].

    `num_rows` is the largest number of sequences on any rank, so that all ranks gather the same shape.
    """
    return _by_sequence(keys.rank, keys.is_copy, layout, num_ranks, num_rows)


def residuals_per_sequence(
    keys: CopyKeys, shared: Tensor | None, layout: Layout, num_ranks: int, num_rows: int
) -> Tensor:
    """Tokens whose residual must come from the old home if their sequence is rebuilt at a rank, int64 [num_rows, N].

    A row that is sent for its token alone can carry the residual anywhere. One whose answer is shared cannot, since
    others take the answer too; it spares the residual only where the sequence is rebuilt at the row's own rank.
    """
    sent = keys.rank >= 0  # [T, K]
    plain = sent if shared is None else sent & ~shared
    needy = ~plain.any(1, keepdim=True)  # [T, 1]
    total = torch.zeros(num_rows, 1, dtype=torch.int64, device=keys.rank.device)
    total[:, 0].index_add_(0, layout.sequence_of_token, needy[:, 0].long())
    return total - _by_sequence(keys.rank, keys.is_copy & needy, layout, num_ranks, num_rows)


def _by_sequence(rank: Tensor, mask: Tensor, layout: Layout, num_ranks: int, num_rows: int) -> Tensor:
    out = torch.zeros(num_rows, num_ranks, dtype=torch.int64, device=rank.device)
    cell = layout.sequence_of_token[:, None] * num_ranks + rank.clamp_min(0)  # [T, K]
    out.view(-1).index_add_(0, cell.flatten(), mask.flatten().long())
    return out


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

    counts: int64 [S, N] rows of each sequence at each rank. residuals_sent: int64 [S, N] residuals that the old home
    sends if the sequence is rebuilt there; None: none anywhere.
    """

    old: Layout
    new: Layout
    counts: np.ndarray
    residuals_sent: np.ndarray | None = None

    @property
    def moved(self) -> np.ndarray:
        """Whether each sequence changes its rank, bool [S]."""
        return self.old.table.home_rank != self.new.table.home_rank

    def exchange(self, comm: Comm) -> RowExchange:
        """Split sizes of the combine: rows of this rank by new home, and rows for this rank by where they were."""
        me, N = comm.mesh.ep_rank, comm.mesh.ep_size
        home = self.new.table.home_rank
        away = np.zeros(len(home), dtype=np.int64)
        if self.residuals_sent is not None:
            away[self.moved] = self.residuals_sent[np.arange(len(home)), home][self.moved]
        send = np.zeros(N, dtype=np.int64)
        np.add.at(send, home, self.counts[:, me])
        np.add.at(send, home, np.where(self.old.table.home_rank == me, away, 0))
        receive = self.counts[home == me].sum(0)
        np.add.at(receive, self.old.table.home_rank[home == me], away[home == me])
        send[me] = receive[me] = 0
        return RowExchange(comm, tuple(int(n) for n in send), tuple(int(n) for n in receive))

    def on_device(self, array: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.old.device, torch.int64, non_blocking=True)

    def place_of(self, global_token: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(sequence, new home, row at the new home) of tokens by global id; int64, shaped as `global_token`."""
        table, new_table = self.old.table, self.new.table
        first = self.on_device(table.first_token)
        # The last sequence that begins at or before the token; an empty sequence shares its first id with the next
        # one, which `right` passes over.
        sequence = torch.searchsorted(first, global_token, right=True) - 1
        start = np.zeros(len(table.lengths), dtype=np.int64)
        for rank in range(int(new_table.home_rank.max(initial=0)) + 1):
            here = new_table.sequences_of(rank)
            start[here] = np.cumsum(table.lengths[here]) - table.lengths[here]
        row = global_token - first[sequence] + self.on_device(start)[sequence]
        return sequence, self.on_device(new_table.home_rank)[sequence], row

    def stayed_rows(self) -> tuple[Tensor, Tensor]:
        """Rows of this rank's tokens that stay: (row before, row after), int64 each."""
        keep = [(i, s) for i, s in enumerate(self.old.sequences) if self.new.table.home_rank[s] == self.new.rank]
        after = {int(s): i for i, s in enumerate(self.new.sequences)}
        empty = np.zeros(0, dtype=np.int64)
        lengths = self.old.table.lengths
        before_rows = [self.old.starts[i] + np.arange(lengths[s]) for i, s in keep]
        after_rows = [self.new.starts[after[int(s)]] + np.arange(lengths[s]) for _, s in keep]
        rows = [np.concatenate([empty, *parts]) for parts in (before_rows, after_rows)]
        return self.on_device(rows[0]), self.on_device(rows[1])


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
