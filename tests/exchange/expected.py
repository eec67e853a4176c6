"""What must travel, counted token by token from the routing alone; nothing of the exchange is asked."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from luffy.comm import DIRECTIONS, LINK_CLASSES

NODES = (0, 0, 1, 1)  # four ranks, two nodes


@dataclass(frozen=True)
class Size:
    """per: "pairs" or "ranks". row, weight: bytes of a row of the stream and of one routing weight."""

    per: str
    row: int
    weight: int


class ExpectedTraffic:
    """Bytes that each rank hands to others: int64 [world, directions, link classes]."""

    def __init__(self, nodes: tuple[int, ...] = NODES) -> None:
        self.nodes = nodes
        self.bytes = np.zeros((len(nodes), len(DIRECTIONS), len(LINK_CLASSES)), dtype=np.int64)

    def send(self, direction: str, source: int, target: int, num_bytes: int) -> None:
        if source != target:
            link = "intra_node" if self.nodes[source] == self.nodes[target] else "inter_node"
            self.bytes[source, DIRECTIONS.index(direction), LINK_CLASSES.index(link)] += num_bytes

    def all_gather(self, ranks: range, num_bytes: int) -> None:
        """Each rank hands its part to every other."""
        for source in ranks:
            for target in ranks:
                self.send("control", source, target, num_bytes)

    def all_reduce(self, ranks: range, num_bytes: int) -> None:
        """The ring: each rank passes 2 (n - 1) / n of the tensor on to its successor."""
        n = len(ranks)
        for i, source in enumerate(ranks):
            self.send("control", source, ranks[(i + 1) % n], 2 * (n - 1) * num_bytes // n)

    def exchange(self, routings: Sequence[np.ndarray], ranks: range, owner: list[int], size: Size) -> None:
        """One layer of an EP group, forward and backward: the counts that all tell each other, then the rows.

        routings: expert ids [T, K] of the tokens of each rank, -1 for none. owner: the EP rank of each expert.
        """
        self.all_gather(ranks, 2 * len(ranks) * 4)  # int32 [2, ep_size]: copies and pairs by rank
        for home, ids in zip(ranks, routings, strict=True):
            for token in ids:
                self.token(home, [ranks[owner[e]] for e in token if e >= 0], len(token), size)

    def token(self, home: int, targets: list[int], top_k: int, size: Size) -> None:
        """One token to the ranks of its experts and back; `targets` has one entry an expert."""
        choices = 1 if size.per == "pairs" else top_k  # what a row tells of: its own choice, or all of the token's
        for target in targets if size.per == "pairs" else sorted(set(targets)):
            self.send("dispatch", home, target, size.row)
            self.send("control", home, target, choices * (2 + size.weight))  # 16-bit ids, weights
            self.send("combine", target, home, size.row)
            self.send("combine_backward", home, target, size.row)
            self.send("dispatch_backward", target, home, size.row)
            self.send("control", target, home, choices * size.weight)  # gradients of the weights
