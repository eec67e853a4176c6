"""Stragglers: a rank whose own work takes longer than the others', step after step, so that all wait for it.

A rank is busy in the part of a step that is neither exchange nor the sum of gradients. Exchanges make all ranks wait
for the busiest one; what the others wait for it, as a share of the step, is written to every record.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

WINDOW = 20  # steps
SHARE = 0.1  # of the step that the mean rank waits for one
OFTEN = 0.8  # of the window in which it must be the same rank
_WAITS = ("exchange", "gradients")


def busy_seconds(split: Mapping[str, float]) -> float:
    """This rank's own work, from the phases of its clock."""
    return sum(seconds for phase, seconds in split.items() if phase not in _WAITS)


class Stragglers:
    """Follows which rank is the busiest; `read` gives what a record says of it and, once in a while, a warning."""

    def __init__(self) -> None:
        self._slowest: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._warned: set[int] = set()

    def read(self, busy: Sequence[float], step_seconds: float) -> tuple[dict[str, Any], str | None]:
        """busy: of each rank in the step. The record's entry, and the line of a warning the first time it is due."""
        if len(busy) < 2:
            return {}, None
        rank = int(np.argmax(busy))
        others = [b for r, b in enumerate(busy) if r != rank]
        share = max(0.0, busy[rank] - float(np.mean(others))) / max(step_seconds, 1e-9)
        self._slowest.append((rank, share))
        entry = {"slowest": {"rank": rank, "waited_for_share": round(min(1.0, share), 4)}}
        return entry, self._warning()

    def _warning(self) -> str | None:
        if len(self._slowest) < WINDOW:
            return None
        rank, times = Counter(rank for rank, _ in self._slowest).most_common(1)[0]
        share = float(np.median([s for r, s in self._slowest if r == rank]))
        if times < OFTEN * WINDOW or share < SHARE or rank in self._warned:
            return None
        self._warned.add(rank)
        return f"rank {rank} is a straggler: in {WINDOW} steps the others waited for it {share:.0%} of the time"
