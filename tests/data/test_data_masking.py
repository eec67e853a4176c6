"""BERT's masking: the right shares, at least one place, the same everywhere."""

import numpy as np
import pytest

from luffy.data import IGNORE_INDEX, Sequence, mask_for_mlm

VOCAB_SIZE, MASK_ID = 1000, 1


def sequence(sequence_id: int, length: int) -> Sequence:
    tokens = np.random.default_rng(sequence_id).integers(2, VOCAB_SIZE, length)
    return Sequence(sequence_id, tokens, np.roll(tokens, -1), True)


def mask(original: Sequence, seed: int = 3, probability: float = 0.15) -> Sequence:
    return mask_for_mlm(original, mask_id=MASK_ID, vocab_size=VOCAB_SIZE, seed=seed, probability=probability)


def test_shares_and_labels() -> None:
    original = sequence(5, 200_000)
    before = original.tokens.copy()
    masked = mask(original)
    np.testing.assert_array_equal(original.tokens, before)
    chosen = masked.labels != IGNORE_INDEX
    np.testing.assert_array_equal(masked.labels[chosen], before[chosen])
    np.testing.assert_array_equal(masked.tokens[~chosen], before[~chosen])
    to_mask, kept = masked.tokens[chosen] == MASK_ID, masked.tokens[chosen] == before[chosen]
    assert abs(chosen.mean() - 0.15) < 0.005
    assert abs(to_mask.mean() - 0.8) < 0.01 and abs(kept.mean() - 0.1) < 0.01
    assert masked.tokens.min() >= 0 and masked.tokens.max() < VOCAB_SIZE
    assert masked.tokens.dtype == masked.labels.dtype == np.int64
    assert (masked.sequence_id, masked.starts_stream) == (5, True)


def test_at_least_one_place_is_chosen() -> None:
    for sequence_id in range(50):
        assert (mask(sequence(sequence_id, 2)).labels != IGNORE_INDEX).sum() >= 1
    assert (mask(sequence(1, 9), probability=0.0).labels != IGNORE_INDEX).sum() == 1
    assert (mask(sequence(1, 9), probability=1.0).labels != IGNORE_INDEX).all()


def test_repeats_by_seed_and_sequence() -> None:
    first, again = mask(sequence(8, 64)), mask(sequence(8, 64))
    np.testing.assert_array_equal(first.tokens, again.tokens)
    np.testing.assert_array_equal(first.labels, again.labels)
    assert (first.labels != mask(sequence(8, 64), seed=4).labels).any()
    assert ((mask(sequence(9, 64)).labels == IGNORE_INDEX) != (first.labels == IGNORE_INDEX)).any()
    mask(sequence(2**40, 8), seed=-1)  # any integers will do


def test_the_draw_is_pinned() -> None:
    """A resumed run on other software must mask the same places: these may never change."""
    masked = mask(Sequence(7, np.arange(100, 120), np.arange(101, 121), True), seed=11)
    assert np.flatnonzero(masked.labels != IGNORE_INDEX).tolist() == [2, 9, 11]
    assert masked.tokens[[2, 9, 11]].tolist() == [656, 1, 831]


@pytest.mark.parametrize("probability", [-0.1, 1.1])
def test_impossible_probability(probability: float) -> None:
    with pytest.raises(ValueError, match="probability"):
        mask(sequence(1, 4), probability=probability)
