"""The loader's promises, checked against slow and obvious references."""

import itertools
import os
import pickle
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.data import IGNORE_INDEX, Sequence, SequenceLoader, TokenSplit
from luffy.errors import UserError

EOS = 0
MakeSplit = Callable[..., TokenSplit]
lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)
properties = settings(deadline=None, max_examples=40)


def loader_of(
    split: TokenSplit, length: int = 8, batch: int = 4, seed: int = 0, **options: object
) -> SequenceLoader:
    return SequenceLoader(
        split,
        sequence_length=length,
        global_batch_size=batch,
        seed=seed,
        eos_id=EOS,
        **options,  # type: ignore[arg-type]
    )


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


def one_epoch(loader: SequenceLoader) -> list[Sequence]:
    steps = -(-loader.num_sequences // loader.global_batch_size)
    return [sequence for step in range(steps) for sequence in loader.batch(step)][: loader.num_sequences]


def same(one: list[Sequence], two: list[Sequence]) -> bool:
    return len(one) == len(two) and all(
        a.sequence_id == b.sequence_id
        and a.starts_stream == b.starts_stream
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.labels, b.labels)
        for a, b in zip(one, two, strict=True)
    )


# How the text is cut


@properties
@given(
    lengths=lengths_strategy, length=st.integers(1, 50), batch=st.integers(1, 6), seed=st.integers(0, 2**70)
)
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
    assert [
        [*sequence.tokens.tolist(), int(sequence.labels[-1])] for sequence in one_epoch(loader)
    ] == expected


@properties
@given(lengths=lengths_strategy, length=st.integers(1, 12), seed=st.integers(0, 99))
def test_fixed_pieces_tile_the_stream(
    make_split: MakeSplit, lengths: list[int], length: int, seed: int
) -> None:
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
def test_streams_continue_from_step_to_step(
    make_split: MakeSplit, lengths: list[int], length: int, batch: int
) -> None:
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


# The order of sequences


@properties
@given(
    lengths=lengths_strategy,
    share=st.integers(1, 4),
    world_size=st.sampled_from([1, 2, 3, 4, 8]),
    step=st.integers(0, 30),
    mode=st.sampled_from(["documents", "fixed", "streams"]),
)
def test_ranks_share_out_one_global_batch(
    make_split: MakeSplit, lengths: list[int], share: int, world_size: int, step: int, mode: str
) -> None:
    batch = share * world_size
    split = make_split([*lengths, 40])
    loader = loader_of(split, 2 if mode == "documents" else 1, batch, 5, mode=mode)
    whole = loader.batch(step)
    assert [sequence.sequence_id for sequence in whole] == list(range(step * batch, (step + 1) * batch))
    shares = [
        loader_of(split, 2 if mode == "documents" else 1, batch, 5, mode=mode).batch(step, rank, world_size)
        for rank in range(world_size)
    ]
    assert all(len(part) == share for part in shares)
    assert same([sequence for part in shares for sequence in part], whole)


@properties
@given(lengths=lengths_strategy, batch=st.integers(1, 9), start=st.integers(0, 40), seed=st.integers(0, 9))
def test_resuming_is_a_slice_of_the_uninterrupted_run(
    make_split: MakeSplit, lengths: list[int], batch: int, start: int, seed: int
) -> None:
    split = make_split(lengths)
    uninterrupted = loader_of(split, 8, batch, seed)
    run = [uninterrupted.batch(step) for step in range(start + 4)]
    resumed = loader_of(split, 8, batch, seed)
    assert all(same(resumed.batch(step), run[step]) for step in range(start, start + 4))


def test_epochs_are_different_permutations(make_split: MakeSplit) -> None:
    loader = loader_of(make_split([40] * 12), 8, 7, seed=3)
    count = loader.num_sequences
    run = [sequence for step in range(-(-4 * count // 7)) for sequence in loader.batch(step)]
    first_tokens = [int(sequence.tokens[0]) for sequence in run]
    epochs = [first_tokens[epoch * count : (epoch + 1) * count] for epoch in range(4)]
    assert all(sorted(epoch) == sorted(epochs[0]) and len(set(epoch)) == count for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    other = [
        int(sequence.tokens[0]) for sequence in one_epoch(loader_of(make_split([40] * 12), 8, 7, seed=4))
    ]
    assert other != epochs[0]


def test_a_batch_larger_than_an_epoch(make_split: MakeSplit) -> None:
    loader = loader_of(make_split([8] * 3), 8, 10)
    tokens = [int(sequence.tokens[0]) for step in range(3) for sequence in loader.batch(step)]
    assert all(sorted(tokens[start : start + 3]) == [1, 9, 17] for start in range(0, 30, 3))


def test_order_without_shuffling(make_split: MakeSplit) -> None:
    loader = loader_of(make_split([8] * 5), 8, 2, shuffle=False)
    tokens = [int(sequence.tokens[0]) for step in range(3) for sequence in loader.batch(step)]
    assert tokens == [1, 9, 17, 25, 33, 1]


def test_the_order_is_pinned_and_the_same_in_another_process(make_split: MakeSplit) -> None:
    """A resumed run on other software must go on with the same order: it may never change."""
    split = make_split([8] * 10)
    order = [int(sequence.tokens[0] // 8) for sequence in one_epoch(loader_of(split, 8, 5, seed=1))]
    assert order == [3, 5, 2, 9, 7, 0, 8, 6, 1, 4]
    code = (
        "import pickle, sys; from luffy.data import SequenceLoader; "
        "split = pickle.loads(sys.stdin.buffer.read()); "
        "l = SequenceLoader(split, sequence_length=8, global_batch_size=5, seed=1, eos_id=0); "
        "print([int(s.tokens[0] // 8) for t in range(2) for s in l.batch(t)])"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "5"}
    out = subprocess.run(
        [sys.executable, "-c", code],
        input=pickle.dumps(split),
        env=environment,
        capture_output=True,
        check=True,
    )
    assert out.stdout.decode().strip() == str(order)


# Evaluation


@properties
@given(
    lengths=lengths_strategy,
    batch=st.integers(1, 6),
    num_batches=st.one_of(st.none(), st.integers(0, 9)),
    mode=st.sampled_from(["documents", "fixed"]),
)
def test_evaluation_is_fixed_and_repeats_nothing(
    make_split: MakeSplit, lengths: list[int], batch: int, num_batches: int | None, mode: str
) -> None:
    split = make_split([*lengths, 9])
    loader = loader_of(split, 8, 2 * batch, seed=1, mode=mode)
    batches = list(loader.eval_batches(num_batches))
    flat = [sequence for part in batches for sequence in part]
    starts = [tuple(sequence.tokens.tolist()) for sequence in flat]
    if loader.num_full_batches:
        assert len(batches) == max(
            1, min(loader.num_full_batches if num_batches is None else num_batches, loader.num_full_batches)
        )
        assert len(set(starts)) == len(starts)
    else:
        assert len(batches) == 1 and len(flat) == 2 * batch and len(set(starts)) == loader.num_sequences
    other = loader_of(split, 8, 2 * batch, seed=2, mode=mode, shuffle=False)
    halves = [list(other.eval_batches(num_batches, rank, 2)) for rank in range(2)]
    assert same([s for one, two in zip(*halves, strict=True) for s in one + two], flat)


def test_a_short_evaluation_is_spread_over_the_split(make_split: MakeSplit) -> None:
    loader = loader_of(make_split([8] * 100), 8, 2)
    places = [int(sequence.tokens[0]) // 8 for part in loader.eval_batches(5) for sequence in part]
    assert places == list(range(0, 100, 10))


def test_evaluating_streams_follows_them(make_split: MakeSplit) -> None:
    loader = loader_of(make_split([50, 50]), 8, 2, mode="streams")
    batches = list(loader.eval_batches(3))
    assert all(same(batches[step], loader.batch(step)) for step in range(3))


# Mistakes


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"length": 0}, "--sequence-length 0"),
        ({"batch": 0}, "--batch-size 0"),
        ({"mode": "lines"}, "--sequence-mode lines is unknown: use one of documents, fixed, streams"),
        ({"length": 99, "mode": "fixed"}, "20 tokens in 2 documents, fewer than the 100 needed"),
        ({"length": 8, "mode": "streams"}, "fewer than the 33 needed"),
    ],
)
def test_mistakes_are_named(make_split: MakeSplit, options: dict[str, object], said: str) -> None:
    with pytest.raises(UserError) as caught:
        loader_of(make_split([10, 10]), **options)  # type: ignore[arg-type]
    assert said in str(caught.value) and "\n" not in str(caught.value)


def test_an_empty_split(tmp_path: Path) -> None:
    for mode in ("documents", "fixed", "streams"):
        with pytest.raises(UserError, match=r"--data: the valid split has 0 tokens"):
            loader_of(TokenSplit(tmp_path, "valid", "<u2", ()), mode=mode)


def test_batch_that_does_not_divide(make_split: MakeSplit) -> None:
    loader = loader_of(make_split([10]), batch=6)
    with pytest.raises(UserError, match="--batch-size 6 does not divide among 4 ranks"):
        loader.batch(0, 0, 4)
    for step, rank, world_size in ((-1, 0, 1), (0, 2, 2), (0, -1, 2)):
        with pytest.raises(ValueError, match=r"is negative|is not one of"):
            loader.batch(step, rank, world_size)


def test_changing_tokens_leaves_labels_alone(make_split: MakeSplit) -> None:
    (sequence,) = loader_of(make_split([10]), batch=1).batch(0)
    labels = sequence.labels.copy()
    sequence.tokens[:] = 0
    np.testing.assert_array_equal(sequence.labels, labels)


def test_the_index_stays_small_for_millions_of_documents() -> None:
    class Huge:
        name, num_tokens, num_documents = "train", 0, 2_000_000

        def document_lengths(self) -> np.ndarray:
            return np.full(self.num_documents, 700)

    loader = loader_of(Huge(), 128, 4, shuffle=False)  # type: ignore[arg-type]
    assert loader.num_sequences == 2_000_000 * 6
    arrays = [value for value in vars(loader._pieces).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 8 * 2_000_000
