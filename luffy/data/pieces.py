"""Where each training sequence lies in the token shards: three ways to cut a corpus.

Each class numbers the sequences of one pass over a split and reads any of them by number, so that order,
sharding and resumption (see `loader`) are arithmetic on numbers. A sequence of n inputs is read as n + 1
tokens, because the label of an input is the token after it; neighbours therefore overlap by one token and no
label is lost.

Nothing is stored per sequence. One int64 per document (80 MB for ten million) says where its sequences begin,
and a binary search finds the document of a sequence.
"""

from typing import Protocol

import numpy as np

from luffy.data.token_corpus import TokenSplit


class Pieces(Protocol):
    """A numbered cutting of a split; `read(i)` gives int64 [length + 1]: the inputs and the last label."""

    @property
    def num_sequences(self) -> int: ...

    def read(self, index: int) -> np.ndarray: ...


class DocumentPieces:
    """Every document on its own: its tokens and the end-of-text token, cut every `sequence_length` inputs.

    A last piece of fewer than `min_length` inputs is dropped (a step's overhead is not worth a handful of
    tokens), unless it is a full one or all there is of the document.
    """

    def __init__(self, split: TokenSplit, sequence_length: int, eos_id: int, min_length: int) -> None:
        self._split, self._sequence_length, self._eos_id = split, sequence_length, eos_id
        # A document of n tokens has n inputs, each with a label: the last one's is the end-of-text token.
        num_pieces, rest = np.divmod(split.document_lengths(), sequence_length)
        num_pieces += (rest >= max(1, min_length)) | ((num_pieces == 0) & (rest > 0))
        self._end = np.cumsum(num_pieces)  # [num_documents]: one past the document's last sequence

    @property
    def num_sequences(self) -> int:
        return int(self._end[-1]) if len(self._end) else 0

    def read(self, index: int) -> np.ndarray:
        document_index = int(np.searchsorted(self._end, index, side="right"))
        first = int(self._end[document_index - 1]) if document_index else 0
        start = (index - first) * self._sequence_length
        document = self._split.document(document_index)
        inside = document[start : start + self._sequence_length + 1]
        if len(inside) == self._sequence_length + 1:
            return inside.astype(np.int64)
        tokens = np.empty(len(inside) + 1, dtype=np.int64)
        tokens[:-1], tokens[-1] = inside, self._eos_id
        return tokens


class _TokenStream:
    """All documents as one stream, an end-of-text token after each."""

    def __init__(self, split: TokenSplit, eos_id: int) -> None:
        self._split, self._eos_id = split, eos_id
        self._end = np.cumsum(split.document_lengths() + 1)  # [num_documents]: one past the document's end-of-text

    @property
    def num_labels(self) -> int:
        return max(0, int(self._end[-1]) - 1) if len(self._end) else 0

    def read(self, start: int, num_tokens: int) -> np.ndarray:
        tokens = np.empty(num_tokens, dtype=np.int64)
        filled = 0
        document_index = int(np.searchsorted(self._end, start, side="right"))
        offset = start - (int(self._end[document_index - 1]) if document_index else 0)
        while filled < num_tokens:
            part = self._split.document(document_index)[offset : offset + num_tokens - filled]
            tokens[filled : filled + len(part)] = part
            filled += len(part)
            if filled < num_tokens:
                tokens[filled] = self._eos_id
                filled += 1
            document_index, offset = document_index + 1, 0
        return tokens


class FixedPieces:
    """The stream cut in pieces of exactly `sequence_length` inputs; what is left over is dropped."""

    def __init__(self, split: TokenSplit, sequence_length: int, eos_id: int) -> None:
        self._stream = _TokenStream(split, eos_id)
        self._sequence_length = sequence_length
        self.num_sequences = self._stream.num_labels // sequence_length

    def read(self, index: int) -> np.ndarray:
        return self._stream.read(index * self._sequence_length, self._sequence_length + 1)


class StreamLanes:
    """The stream divided in contiguous lanes of whole segments, for models with segment recurrence.

    Sequence t * num_lanes + j is segment t of lane j: read in order, each place in the batch continues the
    text that it held the step before (Transformer-XL: Dai et al., 2019).
    """

    def __init__(self, split: TokenSplit, sequence_length: int, eos_id: int, num_lanes: int) -> None:
        self._stream = _TokenStream(split, eos_id)
        self._sequence_length, self._num_lanes = sequence_length, num_lanes
        self.segments_per_lane = self._stream.num_labels // (sequence_length * num_lanes)
        self.num_sequences = self.segments_per_lane * num_lanes

    def read(self, index: int) -> np.ndarray:
        segment, lane = divmod(index, self._num_lanes)
        start = (lane * self.segments_per_lane + segment) * self._sequence_length
        return self._stream.read(start, self._sequence_length + 1)
