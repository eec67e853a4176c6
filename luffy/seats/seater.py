"""Seats of the sequences of one optimizer step: a rank and a micro-batch each.

A seat is decided in two steps, both in integers, so that every rank comes to the same seats by itself.

1. *The expert-parallel rank*, by predicted rows: the placement strategy `best` (luffy.plan.best) under equal counts, or
   budgets of tokens and attention operations where lengths differ, of the whole step. It is asked with several weights
   for rows at ranks whose experts are in demand, and what leaves the busiest rank the least to receive or send is
   taken; if that is more than as read, nobody moves.
2. *The cell*, a micro-batch of a data-parallel group, which costs no rows: sequences are dealt so that cells are alike
   in tokens, attention operations, and rows that each rank receives (luffy.seats.cells).

Whatever does not come within the budgets stays as it was read, which always does.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence as SequenceOf
from dataclasses import replace
from typing import Protocol

import numpy as np
from torch import Tensor

from luffy.data.loader import Sequence
from luffy.plan.balance import rank_loads
from luffy.plan.placement import plan_placement
from luffy.plan.problem import Balance, PlacementProblem
from luffy.plan.topology import Topology
from luffy.plan.traffic import bottleneck_femtoseconds
from luffy.seats.cells import deal_cells
from luffy.seats.features import features_of
from luffy.seats.layout import Seating, SeatLayout, as_read
from luffy.seats.predictor import RowPredictor

SLACK = 0.1  # of the budgets, over the mean
BOTTLENECK_WEIGHTS = (0.0, 1.0, 2.0)  # of luffy.plan.best, to be tried


class Seats(Protocol):
    """A way to seat sequences. Every rank calls `seat` with the same sequences and gets the same seats.

    Where no rank sees all sequences, each rank describes its own, the descriptions are gathered, and `place` decides.
    """

    name: str

    def seat(self, sequences: SequenceOf[Sequence], layout: SeatLayout) -> Seating:
        """Seats of the whole batch of an optimizer step, in reading order."""
        ...

    def describe(self, sequences: SequenceOf[np.ndarray]) -> np.ndarray:
        """int16 [S, n]: all that `place` wants to know of sequences of token ids, n the same for all."""
        ...

    def place(self, described: np.ndarray, lengths: np.ndarray, layout: SeatLayout, read: Seating) -> Seating:
        """Seats of B sequences that were read at `read`."""
        ...

    def state(self) -> dict[str, Tensor]:
        """For checkpoints."""
        ...

    def load(self, state: dict[str, Tensor]) -> None:
        """Take a state up; what does not fit (of another number of ranks) is left."""
        ...


class AsRead:
    """Every sequence is computed where it was read."""

    name = "as-read"

    def seat(self, sequences: SequenceOf[Sequence], layout: SeatLayout) -> Seating:
        return as_read(len(sequences), layout)

    def describe(self, sequences: SequenceOf[np.ndarray]) -> np.ndarray:
        return np.zeros((len(sequences), 0), dtype=np.int16)

    def place(self, described: np.ndarray, lengths: np.ndarray, layout: SeatLayout, read: Seating) -> Seating:
        return read

    def state(self) -> dict[str, Tensor]:
        return {}

    def load(self, state: dict[str, Tensor]) -> None:
        pass


class LearntSeats:
    """By rows that `predictor` foretells; as read until it has been fitted.

    seen: what this rank has observed since the predictor was refreshed (luffy.seats.sharing).
    teaches: a sequence's topic is the rank that it sits on, for the seat loss to pull its tokens there.
    """

    name = "learnt"

    def __init__(self, ep_size: int, teaches: bool = False) -> None:
        self.teaches = teaches
        self.predictor, self.seen = RowPredictor(ep_size), RowPredictor(ep_size)

    def forget(self) -> None:
        """Drop all that is known, as when experts have moved."""
        self.predictor.forget()
        self.seen.forget()

    @property
    def is_fitted(self) -> bool:
        return self.predictor.coefficients is not None

    def seat(self, sequences: SequenceOf[Sequence], layout: SeatLayout) -> Seating:
        read = as_read(len(sequences), layout)
        if not self.is_fitted:
            return read
        lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int64)
        return self.place(self.describe([s.tokens for s in sequences]), lengths, layout, read)

    def describe(self, sequences: SequenceOf[np.ndarray]) -> np.ndarray:
        return features_of(sequences)

    def place(self, described: np.ndarray, lengths: np.ndarray, layout: SeatLayout, read: Seating) -> Seating:
        if not self.is_fitted:
            return read
        seating = seat_by_rows(self.predictor.predict(described, lengths), lengths, layout, read)
        if not self.teaches:
            return seating
        return replace(seating, topic=seating.ep_rank(layout), num_topics=layout.ep_size)

    def state(self) -> dict[str, Tensor]:
        return self.predictor.state()

    def load(self, state: dict[str, Tensor]) -> None:
        self.predictor.load(state)


def seat_by_rows(rows: np.ndarray, lengths: np.ndarray, layout: SeatLayout, read: Seating) -> Seating:
    """Seats by rows that each sequence is expected to send to each rank of its group, int64 [B, N].

    lengths [B]: tokens. read: where sequences are now; it keeps whoever has nothing to gain.
    """
    home = read.ep_rank(layout)
    ep_rank = choose_ranks(rows, lengths, home, layout)
    if layout.num_cells == 1:
        return Seating(ep_rank, read.micro_batch)
    cell = deal_cells(rows, lengths, ep_rank, layout, read, SLACK)
    if cell is None:
        return read
    micro_batch, dp_rank = np.divmod(cell, layout.dp_size)
    return Seating(dp_rank * layout.ep_size + ep_rank, micro_batch)


def choose_ranks(rows: np.ndarray, lengths: np.ndarray, home: np.ndarray, layout: SeatLayout) -> np.ndarray:
    """int64 [B]: the rank in its expert-parallel group of each sequence, that was read at `home` [B]."""
    problem = PlacementProblem(
        counts=rows,
        lengths=lengths,
        home_rank=home,
        topology=layout.topology or Topology.flat(layout.ep_size),
        row_num_bytes=1,
        attention=layout.attention,
        layout="padded" if layout.padded and layout.num_cells == 1 else "packed",
        balance=Balance.for_lengths(lengths, SLACK),
    )
    start = problem if problem.balance.mode == "sequences" else replace(problem, home_rank=_level(problem))
    ways = [plan_placement("best", start, bottleneck_weight=w).new_home for w in BOTTLENECK_WEIGHTS]
    return min([*ways, problem.home_rank], key=lambda way: bottleneck_femtoseconds(problem, way))


def _level(problem: PlacementProblem) -> np.ndarray:
    """int64 [B]: ranks that hold about equally many tokens, for budgets to count from; homes where those are as level.

    The longest sequence first, each to the rank that has the least (Graham's rule).
    """
    heap, found = [(0, r) for r in range(problem.num_ranks)], np.empty_like(problem.home_rank)
    for s in np.argsort(-problem.lengths, kind="stable").tolist():
        tokens, rank = heap[0]
        heapq.heapreplace(heap, (tokens + int(problem.lengths[s]), rank))
        found[s] = rank
    level, now = rank_loads(problem, found), rank_loads(problem, problem.home_rank)
    better = level.tokens.max() <= now.tokens.max() and level.attention_flops.max() <= now.attention_flops.max()
    return found if better else problem.home_rank
