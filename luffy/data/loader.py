"""Which sequences a rank trains on at a step: a pure function of (seed, step, rank, world size).

The global batch of step s is places [s * B, (s + 1) * B) of an endless order in which every epoch is a fresh
permutation of all sequences; rank r of W takes the r-th slice of B / W. Hence

* the global batch at a step is the same at every world size, so runs on 4 and on 16 ranks can be compared;
* no two ranks ever read the same place, without a word between them;
* to resume a run, the step number is all the state there is.

Permutations sort the raw output of the counter-based Philox generator (Salmon et al., 2011), keyed by (seed,
epoch). Raw output is the part of NumPy's generators that is promised never to change, so machines with
different NumPy versions agree on the order.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luffy.data.pieces import DocumentPieces, FixedPieces, Pieces, StreamLanes
from luffy.data.token_corpus import TokenSplit
from luffy.errors import UserError

IGNORE_INDEX = -100  # the label of a place without one; what torch's cross entropy ignores by default
MODES = ("documents", "fixed", "streams")

_UINT64 = 2**64 - 1
_PERMUTATIONS_KEPT = 2  # a batch at the end of an epoch reads from two


@dataclass(frozen=True, slots=True, eq=False)
class Sequence:
    """One training sequence.

    `sequence_id` is its place in the whole run (step * global_batch_size + place in the batch), unique over
    steps and ranks. `tokens` and `labels` are int64 [length]; a label of `IGNORE_INDEX` is not trained on.
    `starts_stream` says that nothing goes before this text: state carried over from the last batch must be
    cleared. `topic`: that of its seat, where it has one (luffy.seats.topic).
    """

    sequence_id: int
    tokens: np.ndarray
    labels: np.ndarray
    starts_stream: bool
    topic: int | None = None


class SequenceLoader:
    """Cuts a split into sequences and deals them to steps and ranks.

    `mode` is how the text is cut:

    * `documents`: each document by itself in pieces of at most `sequence_length` inputs, so lengths differ. A
      last piece under `min_length` inputs is dropped, unless the document has no other.
    * `fixed`: documents joined by end-of-text tokens, cut in pieces of exactly `sequence_length` inputs.
    * `streams`: the joined text in `global_batch_size` lanes; the step's segment of a lane continues that of
      the step before. Order is the point here, so `shuffle` and `seed` do nothing.

    Raises `UserError` when the split holds too little text for one sequence (`streams`: for one in each
    lane), or for sizes below one.
    """

    def __init__(
        self,
        split: TokenSplit,
        *,
        sequence_length: int,
        global_batch_size: int,
        seed: int,
        mode: str = "documents",
        eos_id: int,
        shuffle: bool = True,
        min_length: int = 16,
    ) -> None:
        if sequence_length < 1:
            raise UserError(f"--sequence-length {sequence_length} is out of range: at least 1")
        if global_batch_size < 1:
            raise UserError(f"--batch-size {global_batch_size} is out of range: at least 1")
        self.global_batch_size = global_batch_size
        # What is read, the same wherever the files lie.
        self.fingerprint = repr([[(s.tokens, s.offsets) for s in split.shards], sequence_length, mode, shuffle])
        self._seed = seed & _UINT64
        self._shuffle = shuffle and mode != "streams"
        self._permutations: dict[int, np.ndarray] = {}
        self._segments_per_lane: int | None = None
        self._pieces: Pieces
        if mode == "documents":
            self._pieces = DocumentPieces(split, sequence_length, eos_id, min_length)
        elif mode == "fixed":
            self._pieces = FixedPieces(split, sequence_length, eos_id)
        elif mode == "streams":
            lanes = StreamLanes(split, sequence_length, eos_id, global_batch_size)
            self._pieces, self._segments_per_lane = lanes, lanes.segments_per_lane
        else:
            raise UserError(f"--sequence-mode {mode} is unknown: use one of {', '.join(MODES)}")
        if self.num_sequences == 0:
            needed = sequence_length * (global_batch_size if mode == "streams" else 1) + 1
            smaller = "--sequence-length or --batch-size" if mode == "streams" else "--sequence-length"
            raise UserError(
                f"--data: the {split.name} split has {split.num_tokens} tokens in {split.num_documents} "
                f"documents, fewer than the {needed} needed: give more text or a smaller {smaller}"
            )

    @property
    def num_sequences(self) -> int:
        """Sequences in one epoch."""
        return self._pieces.num_sequences

    @property
    def num_full_batches(self) -> int:
        """Global batches in one epoch without a repeated sequence; 0 if the split is smaller than a batch."""
        return self.num_sequences // self.global_batch_size

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Sequence]:
        """The sequences of one rank at one step, in order: `global_batch_size / world_size` of them.

        Raises `UserError` when the batch does not divide evenly among the ranks.
        """
        if step < 0:
            raise ValueError(f"step {step} is negative")
        places = self._places(rank, world_size)
        first = step * self.global_batch_size
        return [self._sequence(first + place, self._in_order(first + place)) for place in places]

    def eval_batches(
        self, num_batches: int | None = None, rank: int = 0, world_size: int = 1
    ) -> Iterator[list[Sequence]]:
        """The same batches at every call, whatever the seed: for evaluation.

        `num_batches` of them (all full ones if None, never more, at least one) are spread evenly over the
        whole split, so that a short evaluation still sees all kinds of documents; no sequence comes twice,
        unless the split has fewer than one batch of them and is repeated to fill it. In `streams` mode they
        are the first steps, since segments must follow each other.
        """
        full = max(1, self.num_full_batches)
        count = full if num_batches is None else max(1, min(num_batches, full))
        total = count * self.global_batch_size
        places = self._places(rank, world_size)
        for first in range(0, total, self.global_batch_size):
            yield [self._sequence(first + place, self._spread(first + place, total)) for place in places]

    def _spread(self, place: int, total: int) -> int:
        if self._segments_per_lane is not None or total > self.num_sequences:
            return place % self.num_sequences
        return place * self.num_sequences // total

    def _places(self, rank: int, world_size: int) -> range:
        if not 0 <= rank < world_size:
            raise ValueError(f"rank {rank} is not one of {world_size}")
        if self.global_batch_size % world_size:
            raise UserError(
                f"--batch-size {self.global_batch_size} does not divide among {world_size} ranks: "
                f"choose a multiple of {world_size}"
            )
        share = self.global_batch_size // world_size
        return range(rank * share, (rank + 1) * share)

    def _in_order(self, place: int) -> int:
        """The sequence at a place of the endless order."""
        epoch, position = divmod(place, self.num_sequences)
        return int(self._permutation(epoch)[position]) if self._shuffle else position

    def _permutation(self, epoch: int) -> np.ndarray:
        if epoch not in self._permutations:
            while len(self._permutations) >= _PERMUTATIONS_KEPT:
                self._permutations.pop(next(iter(self._permutations)))
            philox = np.random.Philox(key=np.array([self._seed, epoch], dtype=np.uint64))
            order = np.argsort(philox.random_raw(self.num_sequences), kind="stable")
            self._permutations[epoch] = order.astype(np.uint32) if self.num_sequences <= 1 << 32 else order
        return self._permutations[epoch]

    def _sequence(self, sequence_id: int, index: int) -> Sequence:
        tokens = self._pieces.read(index)
        starts = self._segments_per_lane is None or index < self.global_batch_size
        # Labels are copied: views of one array would let a change to the tokens alter the labels.
        return Sequence(sequence_id, tokens[:-1], tokens[1:].copy(), starts)
