"""How documents are cut into sequences, checked against slow and obvious references."""

import itertools
from collections import Counter
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.data import IGNORE_INDEX, Sequence, TokenSplit
from luffy.errors import UserError

from .helpers import EOS, loader_of, one_epoch

MakeSplit = Callable[..., TokenSplit]
lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)
properties = settings(deadline=None, max_examples=40)


def stream_of(lengths: list[int]) -> list[int]:
    """All documents, an end-of-text after each (tokens are 1, 2, 3, ... as `make_split` writes them)."""
    stream, first = [], 1
    for length in lengths:
        stream += [*range(first, first + length), EOS]
        first += length
    return stream


def pairs(sequences: list[Sequence]) -> Counter[tuple[int, int]]:
    """(input, label) pairs: an input token occurs once in the corpus, so they tell places."""
    return Counter(
        (int(token), int(label))
        for sequence in sequences
        for token, label in zip(sequence.tokens, sequence.labels, strict=True)
    )


@properties
@given(lengths=lengths_strategy, length=st.integers(1, 50), batch=st.integers(1, 6), seed=st.integers(0, 2**70))
def test_documents_every_label_once_an_epoch(
    make_split: MakeSplit, lengths: list[int], length: int, batch: int, seed: int
) -> None:
    loader = loader_of(make_split(lengths), length, batch, seed, min_length=1)
    stream = stream_of(lengths)
    expected = Counter((a, b) for a, b in itertools.pairwise(stream) if a != EOS)
    epoch = one_epoch(loader)
    assert pairs(epoch) == expected
    assert all(1 <= len(sequence.tokens) == len(sequence.labels) <= length for sequence in epoch)
    assert all(sequence.tokens.dtype == sequence.labels.dtype == np.int64 for sequence in epoch)
    assert all(sequence.starts_stream and IGNORE_INDEX not in sequence.labels for sequence in epoch)


@properties
@given(lengths=lengths_strategy, length=st.integers(1, 20), min_length=st.integers(0, 25))
def test_documents_short_ends_are_dropped(
    make_split: MakeSplit, lengths: list[int], length: int, min_length: int
) -> None:
    loader = loader_of(make_split(lengths), length, 1, min_length=min_length, shuffle=False)
    expected = []
    first = 1
    for total in lengths:
        tokens = [*range(first, first + total), EOS]
        first += total
        pieces = [tokens[start : start + length + 1] for start in range(0, total, length)]
        if len(pieces) > 1 and len(pieces[-1]) - 1 < min(min_length, length):
            pieces.pop()
        expected += pieces
    assert [[*sequence.tokens.tolist(), int(sequence.labels[-1])] for sequence in one_epoch(loader)] == expected


@properties
@given(lengths=lengths_strategy, length=st.integers(1, 12), seed=st.integers(0, 99))
def test_fixed_pieces_tile_the_stream(make_split: MakeSplit, lengths: list[int], length: int, seed: int) -> None:
    stream = stream_of(lengths)
    whole = (len(stream) - 1) // length
    split = make_split(lengths)
    if whole == 0:
        with pytest.raises(UserError, match="fewer than"):
            loader_of(split, length, mode="fixed")
        return
    epoch = one_epoch(loader_of(split, length, 3, seed, mode="fixed"))
    found = sorted((sequence.tokens.tolist(), sequence.labels.tolist()) for sequence in epoch)
    starts = range(0, whole * length, length)
    assert found == sorted((stream[s : s + length], stream[s + 1 : s + length + 1]) for s in starts)


@properties
@given(lengths=lengths_strategy, length=st.integers(1, 6), batch=st.integers(1, 4))
def test_streams_continue_from_step_to_step(make_split: MakeSplit, lengths: list[int], length: int, batch: int) -> None:
    stream = stream_of(lengths)
    segments = (len(stream) - 1) // (length * batch)
    split = make_split(lengths)
    if segments == 0:
        with pytest.raises(UserError, match="--batch-size"):
            loader_of(split, length, batch, mode="streams")
        return
    loader = loader_of(split, length, batch, mode="streams")
    assert loader.num_sequences == segments * batch
    for step in range(2 * segments + 1):
        for lane, sequence in enumerate(loader.batch(step)):
            start = (lane * segments + step % segments) * length
            assert sequence.tokens.tolist() == stream[start : start + length]
            assert sequence.labels.tolist() == stream[start + 1 : start + length + 1]
            assert sequence.starts_stream == (step % segments == 0)
            assert sequence.sequence_id == step * batch + lane
