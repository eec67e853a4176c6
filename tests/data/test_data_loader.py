"""The loader's promises, checked against slow and obvious references."""

import os
import pickle
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.data import TokenSplit
from luffy.errors import UserError

from .helpers import loader_of, one_epoch, same

MakeSplit = Callable[..., TokenSplit]
lengths_strategy = st.lists(st.integers(1, 40), min_size=1, max_size=12)
properties = settings(deadline=None, max_examples=40)


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
    other = [int(sequence.tokens[0]) for sequence in one_epoch(loader_of(make_split([40] * 12), 8, 7, seed=4))]
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
        name, num_tokens, num_documents, shards = "train", 0, 2_000_000, ()

        def document_lengths(self) -> np.ndarray:
            return np.full(self.num_documents, 700)

    loader = loader_of(Huge(), 128, 4, shuffle=False)  # type: ignore[arg-type]
    assert loader.num_sequences == 2_000_000 * 6
    arrays = [value for value in vars(loader._pieces).values() if isinstance(value, np.ndarray)]
    assert sum(array.nbytes for array in arrays) == 8 * 2_000_000
