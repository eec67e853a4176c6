"""Seats by topic: a sequence sits with the experts of what it is about, which routers are taught to choose.

Topic c of C is at home on EP rank c * N // C of N. With more ranks than topics a topic's sequences are spread over its
N / C ranks. What topics are: luffy.seats.topics; how routers learn to follow: luffy.model.seat_loss.
"""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf

import numpy as np
import torch
from torch import Tensor

from luffy.data.loader import Sequence
from luffy.seats.cells import deal_cells
from luffy.seats.layout import Seating, SeatLayout, as_read
from luffy.seats.seater import SLACK
from luffy.seats.topics import Topics


class TopicSeats:
    """num_topics: C. As read, and without topics, until `topics` are set.

    fewer: topics that `load` found, which have to be cut in parts first.
    """

    name = "topic"

    def __init__(self, num_topics: int) -> None:
        self.num_topics = num_topics
        self.topics: Topics | None = None
        self.fewer: Topics | None = None

    def seat(self, sequences: SequenceOf[Sequence], layout: SeatLayout) -> Seating:
        read = as_read(len(sequences), layout)
        if self.topics is None:
            return read
        lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int64)
        gains = self.topics.gains([s.tokens for s in sequences])
        return self._place(gains, lengths, layout, read)

    def describe(self, sequences: SequenceOf[np.ndarray]) -> np.ndarray:
        """int64 [S, C]: what each topic says of each sequence; [S, 0] before there are topics."""
        return np.zeros((len(sequences), 0), dtype=np.int64) if self.topics is None else self.topics.gains(sequences)

    def place(self, described: np.ndarray, lengths: np.ndarray, layout: SeatLayout, read: Seating) -> Seating:
        return read if self.topics is None else self._place(described, lengths, layout, read)

    def _place(self, gains: np.ndarray, lengths: np.ndarray, layout: SeatLayout, read: Seating) -> Seating:
        assert self.topics is not None
        topic, N, C = self.topics.assign_gains(gains, lengths), layout.ep_size, self.num_topics
        ep_rank = topic * N // C
        for c in range(C) if C < N else ():  # a topic's sequences go round its ranks, the longest first
            own = np.flatnonzero(topic == c)
            own = own[np.argsort(-lengths[own], kind="stable")]
            ep_rank[own] = c * N // C + np.arange(len(own)) % (N // C)
        cell = np.zeros(len(topic), dtype=np.int64)
        if layout.num_cells > 1:
            nothing = np.zeros((len(topic), N), dtype=np.int64)  # no rows are predicted
            dealt = deal_cells(nothing, lengths, ep_rank, layout, read, SLACK)
            if dealt is None:
                return Seating(read.rank, read.micro_batch, topic, C)
            cell = dealt
        micro_batch, dp_rank = np.divmod(cell, layout.dp_size)
        return Seating(dp_rank * N + ep_rank, micro_batch, topic, C)

    def state(self) -> dict[str, Tensor]:
        return {} if self.topics is None else {"counts": torch.from_numpy(self.topics.counts.copy())}

    def load(self, state: dict[str, Tensor]) -> None:
        """Take topics up, merged where there were more. UserError where the numbers do not divide."""
        if "counts" in state:
            kept = Topics(state["counts"].numpy())
            if kept.num_topics < self.num_topics:
                self.fewer = kept
            else:
                self.topics = kept.regrouped(self.num_topics)
