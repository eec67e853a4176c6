"""Cells: which micro-batch of which data-parallel group a sequence joins, once its expert-parallel rank is known.

It costs no rows whichever it is: experts lie alike in all groups. But ranks wait for each other in every layer of every
micro-batch, so what counts is that cells are alike. Ranks deal their sequences at the same time, the longest first,
each to the cell that has the least so far: in tokens and attention operations where lengths differ; of rows that it
makes busy ranks receive, among cells that are equal in those. Where all lengths are equal, every cell gets as many as
it has now.
"""

from __future__ import annotations

import numpy as np

from luffy.plan.balance import budget
from luffy.seats.layout import Seating, SeatLayout

_ONE = 1 << 12  # shares of the mean are counted in units of 1 / _ONE


class _Loads:
    """int64 [G, N] each: what every rank holds in every cell."""

    def __init__(self, lengths: np.ndarray, layout: SeatLayout) -> None:
        self.layout, shape = layout, (layout.num_cells, layout.ep_size)
        self.sequences, self.tokens, self.longest, self.flops = (np.zeros(shape, dtype=np.int64) for _ in range(4))
        seats = layout.num_cells * layout.ep_size
        self.mean_tokens = max(1, int(lengths.sum()) // seats)
        self.mean_flops = max(1, int(layout.attention.sequence_flops(lengths).sum()) // seats)

    def grown(self, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and attention operations [G, N] if one more sequence of lengths [N] joined each rank's cells."""
        attention = self.layout.attention
        if self.layout.padded:
            flops = attention.padded_flops(self.sequences + 1, np.maximum(self.longest, lengths))
        else:
            flops = self.flops + attention.sequence_flops(lengths)
        return self.tokens + lengths, flops

    def add(self, cells: np.ndarray, ranks: np.ndarray, lengths: np.ndarray) -> None:
        """Sequences [n] join; no two the same cell of the same rank."""
        tokens, flops = self.grown(_at(ranks, lengths, self.layout.ep_size))
        self.tokens[cells, ranks], self.flops[cells, ranks] = tokens[cells, ranks], flops[cells, ranks]
        self.longest[cells, ranks] = np.maximum(self.longest[cells, ranks], lengths)
        self.sequences[cells, ranks] += 1

    @classmethod
    def of(cls, lengths: np.ndarray, cell: np.ndarray, ep_rank: np.ndarray, layout: SeatLayout) -> _Loads:
        loads = cls(lengths, layout)
        np.add.at(loads.sequences, (cell, ep_rank), 1)
        np.add.at(loads.tokens, (cell, ep_rank), lengths)
        np.maximum.at(loads.longest, (cell, ep_rank), lengths)
        if layout.padded:
            loads.flops = layout.attention.padded_flops(loads.sequences, loads.longest)
        else:
            np.add.at(loads.flops, (cell, ep_rank), layout.attention.sequence_flops(lengths))
        return loads


def deal_cells(
    rows: np.ndarray, lengths: np.ndarray, ep_rank: np.ndarray, layout: SeatLayout, read: Seating, slack: float
) -> np.ndarray | None:
    """int64 [B]: the cell of each sequence; None where a cell would hold more than budgets allow.

    rows [B, N]: expected at each rank. ep_rank [B]: as decided. Budgets, of tokens and of attention operations: (1 +
    slack) times the mean of all cells, or what the fullest holds as read where that is more.
    """
    now = _Loads.of(lengths, read.cell(layout), read.ep_rank(layout), layout)
    even = len(lengths) == 0 or int(lengths.min()) == int(lengths.max())
    sent = rows.copy()
    sent[np.arange(len(rows)), ep_rank] = 0
    order = np.lexsort((np.arange(len(rows)), -sent.sum(axis=1), -lengths, ep_rank))
    first = np.searchsorted(ep_rank[order], np.arange(layout.ep_size + 1))
    G, N = layout.num_cells, layout.ep_size
    cell = np.zeros(len(rows), dtype=np.int64)
    loads, received = _Loads(lengths, layout), np.zeros((G, N), dtype=np.int64)
    # Every rank goes through its cells from one of its own, so that equals do not all choose the first.
    turn = (np.arange(G)[:, None] + np.arange(N)) % G
    for k in range(int(np.diff(first).max(initial=0))):
        ranks = np.flatnonzero(first[:-1] + k < first[1:])
        chosen = order[first[ranks] + k]
        joining = np.zeros((N, N), dtype=np.int64)
        joining[ranks] = sent[chosen]
        crowding = received @ joining.T  # [G, N]
        if even:
            share = (loads.sequences >= now.sequences).astype(np.int64)
        else:
            tokens, flops = loads.grown(_at(ranks, lengths[chosen], N))
            share = np.maximum(tokens * _ONE // loads.mean_tokens, flops // max(1, loads.mean_flops // _ONE))
        crowding = np.where(share == share.min(axis=0), crowding, np.iinfo(np.int64).max)
        best = turn[np.take_along_axis(crowding, turn, axis=0).argmin(axis=0), np.arange(N)][ranks]
        cell[chosen] = best
        loads.add(best, ranks, lengths[chosen])
        np.add.at(received, best, sent[chosen])
    full = _Loads.of(lengths, cell, ep_rank, layout)
    seats = G * N
    most_tokens = budget(now.tokens.ravel(), loads.mean_tokens * seats, slack)
    most_flops = budget(now.flops.ravel(), loads.mean_flops * seats, slack)
    fits = int(full.tokens.max()) <= most_tokens and int(full.flops.max()) <= most_flops
    return cell if fits else None


def _at(ranks: np.ndarray, values: np.ndarray, num_ranks: int) -> np.ndarray:
    """values [n] of ranks [n] -> [N], 0 elsewhere."""
    out = np.zeros(num_ranks, dtype=np.int64)
    out[ranks] = values
    return out
