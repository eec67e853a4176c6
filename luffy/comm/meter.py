"""The traffic meter: bytes that leave a rank, by direction and by link class.

Every collective of the project reports here; nothing is estimated from shapes afterwards. A byte counts when it
leaves its rank for another one. What a collective hands to its own rank falls into the class "local", which no total
includes; rows that need not travel never enter a collective.

An all-to-all or all-gather is counted as what each rank hands to each peer. An all-reduce of S bytes over n ranks
is counted as the ring moves it: each rank passes 2 (n-1)/n S bytes to its successor, whatever algorithm the
backend picks; every backend's bandwidth-optimal algorithm moves the same volume.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from luffy.comm.ending import attached

DIRECTIONS = (
    "dispatch",
    "combine",
    "dispatch_backward",
    "combine_backward",
    "experts",
    "gradients",
    "control",
)
LINK_CLASSES = ("local", "intra_node", "inter_node")
LOCAL, INTRA_NODE, INTER_NODE = range(3)


class TrafficMeter:
    """Counts what this rank sends. `node_of_rank` maps world ranks to nodes.

    messages, last_direction: of this process; what its heartbeat tells of its progress (luffy.train.heartbeat).
    """

    messages: ClassVar[int] = 0
    last_direction: ClassVar[str] = ""

    def __init__(self, rank: int, node_of_rank: Sequence[int]) -> None:
        self.rank = rank
        self.node_of_rank = tuple(node_of_rank)
        self._bytes = np.zeros((len(DIRECTIONS), len(LINK_CLASSES)), dtype=np.int64)
        # Bytes of token rows by destination rank: one row of the traffic matrix that reports draw.
        self._to_rank = np.zeros(len(self.node_of_rank), dtype=np.int64)
        # Host work that was meant to hide behind a transfer and was not over when the transfer was: an upper bound.
        self.exposed_seconds = 0.0
        self._charged_to: str | None = None
        # When rows were under way, [begin, end] each: filled in by the threads that moved them.
        self._under_way: list[tuple[float, float]] = []

    @contextlib.contextmanager
    def charging(self, direction: str) -> Iterator[None]:
        """Within, count everything under `direction`, whatever it would be called elsewhere."""
        before, self._charged_to = self._charged_to, direction
        try:
            yield
        finally:
            self._charged_to = before

    def watch(self, work: Any) -> None:
        """Note how long a collective over rows is under way, whoever waits for it."""
        begin = time.perf_counter()
        note = attached(lambda _: self._under_way.append((begin, time.perf_counter())))
        work.get_future().add_done_callback(note)

    def take_under_way(self) -> float:
        """Seconds in which rows were under way since last taken, counted once where several were."""
        spans, self._under_way = sorted(self._under_way), []
        seconds, reached = 0.0, 0.0
        for begin, end in spans:
            seconds += max(0.0, end - max(begin, reached))
            reached = max(reached, end)
        return seconds

    def link_class(self, peer: int) -> int:
        """LOCAL, INTRA_NODE or INTER_NODE for world rank `peer` as seen from this rank."""
        if peer == self.rank:
            return LOCAL
        return INTRA_NODE if self.node_of_rank[peer] == self.node_of_rank[self.rank] else INTER_NODE

    def send(self, direction: str, peer: int, num_bytes: int) -> None:
        direction = self._charged_to or direction
        TrafficMeter.messages += 1
        TrafficMeter.last_direction = direction
        self._bytes[DIRECTIONS.index(direction), self.link_class(peer)] += num_bytes
        if direction not in ("control", "gradients"):
            self._to_rank[peer] += num_bytes

    def all_gather(self, direction: str, peers: Sequence[int], num_bytes: int) -> None:
        """`num_bytes` of this rank handed to every other rank of `peers`."""
        for peer in peers:
            if peer != self.rank:
                self.send(direction, peer, num_bytes)

    def all_reduce(self, direction: str, peers: Sequence[int], num_bytes: int) -> None:
        n = len(peers)
        if n > 1:
            successor = peers[(peers.index(self.rank) + 1) % n]
            self.send(direction, successor, 2 * (n - 1) * num_bytes // n)

    def read(self) -> np.ndarray:
        """Counts so far: int64 [directions, link classes], in the order of DIRECTIONS and LINK_CLASSES."""
        return self._bytes.copy()

    def read_to_rank(self) -> np.ndarray:
        """Bytes of rows sent to each world rank, int64 [world_size]."""
        return self._to_rank.copy()

    def take(self) -> np.ndarray:
        """`read`, and start again from zero."""
        counts = self.read()
        self._bytes[:] = 0
        self._to_rank[:] = 0
        return counts


def by_direction(counts: np.ndarray) -> dict[str, int]:
    """Bytes that left a rank, by direction, from the meter's [directions, link classes]."""
    return {d: int(counts[i, INTRA_NODE:].sum()) for i, d in enumerate(DIRECTIONS)}


def by_link(counts: np.ndarray) -> dict[str, int]:
    """Bytes by link class, over all directions."""
    return {c: int(counts[:, i].sum()) for i, c in enumerate(LINK_CLASSES)}
