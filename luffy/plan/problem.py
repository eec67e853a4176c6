"""The question a placement strategy answers: where should each sequence be rebuilt?

After dispatch, the rows of one sequence lie scattered over the ranks that own its experts. `counts[s, r]` says how
many: the number of tokens of sequence s with at least one expert on rank r (after per-rank deduplication each such
token has exactly one row there). Combine sends one row back for each of them, except those already on the rank where
the sequence is rebuilt. So placing s at j costs

    combine:        sum over r != j of counts[s, r]      * row_num_bytes
    next dispatch:  sum over r != j of next_counts[s, r] * row_num_bytes      (only if a prediction is given)

each byte weighted by the link class it crosses. `PlacementProblem.rows` folds both into a single matrix, and every
strategy and every report of bytes starts there. Seats, taken before the first layer (luffy.seats), are the same
question with the rows of all layers as counts. (The backward pass moves the same rows again, a factor of two on both
sides of any comparison.)

A plan must keep ranks balanced, because one overloaded rank costs every rank time. `Balance` says how: equal sequence
counts for batches of one length, or budgets of tokens and attention operations for uneven lengths. Staying put always
satisfies it, by construction.
"""

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal

import numpy as np

from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology

# Sums over all rows must stay inside int64 with room for link weights; see PlacementProblem.
_MAX_TOTAL_ROWS = 1 << 62


@dataclass(frozen=True)
class Balance:
    """What every rank is held to.

    mode "sequences": each rank keeps exactly as many sequences as `home_rank` gives it now.
    mode "tokens": no rank may exceed (1 + slack) times the mean over ranks, or what the busiest rank has now where that
    is more, in tokens and likewise in attention operations. Slack is ignored in mode "sequences".
    """

    mode: Literal["sequences", "tokens"] = "sequences"
    slack: float = 0.1

    def __post_init__(self) -> None:
        if self.mode not in ("sequences", "tokens"):
            raise ValueError(f"balance: mode is 'sequences' or 'tokens', not {self.mode!r}")
        if not self.slack >= 0:
            raise ValueError(f"balance: slack must be >= 0, not {self.slack}")

    @classmethod
    def for_lengths(cls, lengths: np.ndarray, slack: float = 0.1) -> "Balance":
        """Sequence counts when all lengths are alike, token budgets otherwise."""
        even = len(lengths) == 0 or int(lengths.min()) == int(lengths.max())
        return cls("sequences" if even else "tokens", slack)


@dataclass(frozen=True, eq=False)
class PlacementProblem:
    """Input of every strategy; S sequences, N ranks.

    counts [S, N]: rows of each sequence held at each rank after dispatch. lengths [S]: tokens. home_rank [S]: where
    each sequence is now. row_num_bytes: one row on the wire. next_counts [S, N]: predicted rows at the next layer's
    dispatch. All arrays become int64.

    Raises ValueError when shapes disagree, a count or length is negative, a rank is out of range, or the counts are so
    large that their sum would leave 62 bits.
    """

    counts: np.ndarray
    lengths: np.ndarray
    home_rank: np.ndarray
    topology: Topology
    row_num_bytes: int
    next_counts: np.ndarray | None = None
    attention: AttentionCost = field(default_factory=AttentionCost)
    layout: Literal["packed", "padded"] = "packed"
    balance: Balance = field(default_factory=Balance)

    def __post_init__(self) -> None:
        for name in ("counts", "lengths", "home_rank", "next_counts"):
            value = getattr(self, name)
            if value is not None:
                object.__setattr__(self, name, as_int64(name, value))
        S, N = self.lengths.size, self.topology.world_size
        require(self.counts.shape == (S, N), f"counts is {self.counts.shape}, not [{S} sequences, {N} ranks]")
        require(self.lengths.shape == (S,), f"lengths is {self.lengths.shape}, not [{S}]")
        require(self.home_rank.shape == (S,), f"home_rank is {self.home_rank.shape}, not [{S}]")
        if self.next_counts is not None:
            require(self.next_counts.shape == (S, N), f"next_counts is {self.next_counts.shape}, not [{S}, {N}]")
        require(self.layout in ("packed", "padded"), f"layout is 'packed' or 'padded', not {self.layout!r}")
        require(self.row_num_bytes > 0, f"row_num_bytes {self.row_num_bytes} must be positive")
        if S:
            require(int(self.lengths.min()) >= 0, "lengths must be >= 0")
            require(
                int(self.home_rank.min()) >= 0 and int(self.home_rank.max()) < N,
                f"home_rank must lie in 0..{N - 1}",
            )
            self._check_counts(S, N)

    def _check_counts(self, S: int, N: int) -> None:
        largest, smallest = int(self.counts.max()), int(self.counts.min())
        if self.next_counts is not None:
            largest += int(self.next_counts.max())
            smallest = min(smallest, int(self.next_counts.min()))
        require(smallest >= 0, "counts must be >= 0")
        require(S * N * largest < _MAX_TOTAL_ROWS, "counts are too large: their sum must stay below 2**62 rows")

    @property
    def num_sequences(self) -> int:
        return self.lengths.size

    @property
    def num_ranks(self) -> int:
        return self.topology.world_size

    @cached_property
    def rows(self) -> np.ndarray:
        """int64 [S, N]: rows that stay off the wire when s is placed at j.

        The whole of a row of this matrix, less the entry at j, is what placing s at j puts on the wire.
        """
        return self.counts if self.next_counts is None else self.counts + self.next_counts

    @cached_property
    def total_rows(self) -> int:
        """The sum of `rows`."""
        return int(self.rows.sum())

    @cached_property
    def quotas(self) -> np.ndarray:
        """int64 [N]: sequences that each rank holds now, and keeps under balance by sequences."""
        return np.bincount(self.home_rank, minlength=self.num_ranks)


def as_int64(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "iu" and array.size:
        raise ValueError(f"{name} must be integers, not {array.dtype}")
    return np.ascontiguousarray(array, dtype=np.int64)


def require(condition: bool, message: str) -> None:
    if not condition:
        raise ValueError(message)
