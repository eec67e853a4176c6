"""What there is to sit on, and who sits where."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology


@dataclass(frozen=True)
class SeatLayout:
    """What there is to sit on. topology: of one expert-parallel group. World rank = dp_rank * ep_size + ep_rank."""

    ep_size: int
    dp_size: int = 1
    num_micro_batches: int = 1
    padded: bool = False
    topology: Topology | None = None
    attention: AttentionCost = field(default_factory=AttentionCost)

    @property
    def world_size(self) -> int:
        return self.ep_size * self.dp_size

    @property
    def num_cells(self) -> int:
        """Micro-batches of all data-parallel groups: cell = micro_batch * dp_size + dp_rank."""
        return self.dp_size * self.num_micro_batches


@dataclass(frozen=True, eq=False)
class Seating:
    """Where each of B sequences is computed. rank: world rank, micro_batch: int64 [B].

    topic: int64 [B] below num_topics, where sequences have topics.
    """

    rank: np.ndarray
    micro_batch: np.ndarray
    topic: np.ndarray | None = None
    num_topics: int = 0

    def of(self, rank: int, micro_batch: int) -> np.ndarray:
        """The sequences that sit there, in reading order: int64 [n]."""
        return np.flatnonzero((self.rank == rank) & (self.micro_batch == micro_batch))

    def ep_rank(self, layout: SeatLayout) -> np.ndarray:
        """int64 [B]."""
        return self.rank % layout.ep_size

    def cell(self, layout: SeatLayout) -> np.ndarray:
        """int64 [B]."""
        return self.micro_batch * layout.dp_size + self.rank // layout.ep_size


def as_read(num_sequences: int, layout: SeatLayout) -> Seating:
    """Seats as the loader deals B sequences in reading order: micro-batch after micro-batch, rank after rank.

    Raises ValueError unless all seats get equally many.
    """
    places = layout.num_micro_batches * layout.world_size
    if num_sequences % places:
        raise ValueError(f"{num_sequences} sequences do not divide among {places} seats")
    place = np.arange(num_sequences, dtype=np.int64) // max(1, num_sequences // places)
    return Seating(place % layout.world_size, place // layout.world_size)
