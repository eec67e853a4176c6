"""TokenBatch: what travels together.

A rank holds whole sequences, their tokens laid end to end without padding: `hidden` is [T, D] with T the number of
real tokens on this rank. Everything that depends on which sequences are here (lengths, positions, `cu_seqlens`) is a
function of the sequence table, which every rank of the expert-parallel (EP) group knows in full. When a sequence
moves, the table changes and those follow by themselves; nothing but rows has to be sent. Blocks map a TokenBatch to
a TokenBatch and never ask where a sequence came from.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class SequenceTable:
    """All sequences of an EP group: `lengths` int64 [S] in tokens, `home_rank` int64 [S] in EP ranks.

    Sequences are named by their index in the table. On its rank a sequence stands in index order. A token's
    global id is `first_token[sequence] + position`, the same on every rank and under every placement.

    topic: int64 [S] in 0 .. num_topics - 1, where routers learn to stay near (luffy.model.seat_loss); None elsewhere.
    """

    lengths: np.ndarray
    home_rank: np.ndarray
    topic: np.ndarray | None = None
    num_topics: int = 0

    @cached_property
    def first_token(self) -> np.ndarray:
        """Global id of each sequence's first token, int64 [S]."""
        return np.cumsum(self.lengths) - self.lengths

    @property
    def num_tokens(self) -> int:
        return int(self.lengths.sum())

    def sequences_of(self, rank: int) -> np.ndarray:
        """Indices of the sequences on `rank`, ascending."""
        return np.flatnonzero(self.home_rank == rank)

    def moved(self, new_home: np.ndarray) -> SequenceTable:
        return replace(self, home_rank=new_home)


class Layout:
    """How one rank's sequences lie in its rows: host and device views of the table, made once per placement."""

    def __init__(self, table: SequenceTable, rank: int, device: torch.device) -> None:
        self.table, self.rank, self.device = table, rank, device
        self.sequences = table.sequences_of(rank)
        self.lengths: tuple[int, ...] = tuple(int(n) for n in table.lengths[self.sequences])
        self.num_sequences = len(self.lengths)
        self.num_tokens = sum(self.lengths)
        self.max_length = max(self.lengths, default=0)
        self.equal_lengths = len(set(self.lengths)) <= 1

    def _to_device(self, array: np.ndarray, dtype: torch.dtype) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self.device, dtype, non_blocking=True)

    @cached_property
    def _host_lengths(self) -> np.ndarray:
        return np.asarray(self.lengths, dtype=np.int64)

    @cached_property
    def starts(self) -> np.ndarray:
        """Row of each local sequence's first token, int64 [S_local]."""
        return np.cumsum(self._host_lengths) - self._host_lengths

    @cached_property
    def cu_seqlens(self) -> Tensor:
        """Cumulative lengths, int32 [S_local + 1], as variable-length attention wants them."""
        return self._to_device(np.concatenate([[0], np.cumsum(self._host_lengths)]), torch.int32)

    @cached_property
    def host_positions(self) -> np.ndarray:
        return np.arange(self.num_tokens) - np.repeat(self.starts, self._host_lengths)

    @cached_property
    def positions(self) -> Tensor:
        """Position of each token in its sequence, int64 [T]."""
        return self._to_device(self.host_positions, torch.int64)

    @cached_property
    def sequence_of_token(self) -> Tensor:
        """Local index (0 .. S_local-1) of each token's sequence, int64 [T]."""
        return self._to_device(np.repeat(np.arange(self.num_sequences), self._host_lengths), torch.int64)

    @cached_property
    def topic_of_token(self) -> Tensor:
        """The topic of each token's sequence, int64 [T]; the table must have topics."""
        assert self.table.topic is not None
        return self._to_device(np.repeat(self.table.topic[self.sequences], self._host_lengths), torch.int64)

    @property
    def num_moments(self) -> int:
        """Every `moment` is below it."""
        return max(1, self.max_length * self.num_sequences)

    @cached_property
    def moment(self) -> Tensor:
        """Place of each token in the order of positions, then of local sequences: int64 [T].

        What a token takes from earlier moments only can never be of its own future, in whatever sequence.
        """
        return self.positions * self.num_sequences + self.sequence_of_token

    @cached_property
    def tokens_in_time(self) -> Tensor:
        """The tokens ordered by `moment`: int32 [T]."""
        grid = np.arange(self.max_length)[:, None]  # [max_length, S_local] of places and tokens
        return self._to_device((self.starts + grid)[grid < self._host_lengths], torch.int32)

    @cached_property
    def global_token(self) -> Tensor:
        """Global id of each token, int64 [T]."""
        first = np.repeat(self.table.first_token[self.sequences], self._host_lengths)
        return self._to_device(first + self.host_positions, torch.int64)

    @cached_property
    def padded_index(self) -> Tensor:
        """Row of each token in a [S_local * max_length] padded grid, int64 [T]."""
        grid = np.repeat(np.arange(self.num_sequences), self._host_lengths) * self.max_length
        return self._to_device(grid + self.host_positions, torch.int64)

    @cached_property
    def key_mask(self) -> Tensor:
        """True where the padded grid holds a token, bool [S_local, max_length]."""
        return self._to_device(np.arange(self.max_length) < self._host_lengths[:, None], torch.bool)

    @cached_property
    def groups_of_equal_length(self) -> list[tuple[int, Tensor]]:
        """(length, rows int64 [n * length]) for each distinct length: how packed attention runs without padding."""
        groups = []
        for length in sorted(set(self.lengths)):
            starts = self.starts[self._host_lengths == length]
            rows = (starts[:, None] + np.arange(length)).reshape(-1)
            groups.append((length, self._to_device(rows, torch.int64)))
        return groups


@dataclass(frozen=True)
class TokenBatch:
    """The sequences on one rank in the middle of the network.

    hidden: residual stream, [T, D].
    layout: which sequences these are and how they lie in the rows.
    padded: attention runs on a grid padded to the longest sequence (as the paper's testbed did) instead of packed.
    memory: Transformer-XL's states of the previous segment, one [S_local, M, D] per block, or None.
    new_memory: the same for the next segment, filled block by block.
    router_stats: what each MoE layer passed so far has to say to the auxiliary losses.
    similarity: what the last MoE layer found of pairs of tokens, where the recipe looks back at it.
    """

    hidden: Tensor
    layout: Layout
    padded: bool = False
    memory: tuple[Tensor, ...] | None = None
    new_memory: tuple[Tensor, ...] = ()
    router_stats: tuple[Any, ...] = field(default=(), repr=False)
    similarity: Any = field(default=None, repr=False)

    def with_hidden(self, hidden: Tensor) -> TokenBatch:
        return replace(self, hidden=hidden)
