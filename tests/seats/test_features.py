"""Features of sequences: exact means of fixed directions, whatever the lengths and ids."""

import hashlib

import numpy as np
import pytest

from luffy.seats.features import DIM, NUM_DIRECTIONS, ONE, features_of, sequence_features


def directions(ids: np.ndarray) -> np.ndarray:
    """int64 [n, DIM], made from scratch: a row is the next DIM bytes of one stream."""
    raw = np.random.Philox(key=np.array([0x5EA75, 0], dtype=np.uint64)).random_raw((int(ids.max()) + 1) * DIM // 8)
    return raw.astype("<u8").view(np.int8).reshape(-1, DIM)[ids].astype(np.int64)


def test_features_are_the_mean_direction_rounded_half_up():
    rng = np.random.default_rng(0)
    parts = [rng.integers(0, 5000, n) for n in (7, 0, 1, 300)]
    found = features_of(parts)
    assert (found.dtype, found.shape) == (np.int16, (4, DIM))
    assert (found[1] == 0).all()
    for row, ids in zip(found, parts, strict=True):
        if len(ids):
            exact = directions(ids).sum(0) * ONE
            np.testing.assert_array_equal(row, np.floor(exact / len(ids) + 0.5))


def test_long_sequences_and_large_ids_are_exact_too():
    ids = np.full(200_000, 3)  # every sum is as far from 0 as can be: float32 alone would lose it
    ids[-5:] = 3 + 7 * NUM_DIRECTIONS
    np.testing.assert_array_equal(features_of([ids, ids[:1]])[0], directions(np.array([3]))[0] * ONE)
    assert (features_of([np.array([2**31 + 1])]) == features_of([np.array([1])])).all()


def test_the_order_of_tokens_and_of_sequences_changes_nothing():
    rng = np.random.default_rng(1)
    parts = [rng.integers(0, 70_000, n) for n in (64, 65, 900)]
    backwards = features_of([p[::-1] for p in parts[::-1]])
    np.testing.assert_array_equal(features_of(parts), backwards[::-1])


def test_features_never_change():
    """Predictors in checkpoints were fitted to them."""
    found = features_of([np.arange(100), np.arange(1000, 1010)])
    digest = hashlib.sha256(found.astype("<i2").tobytes()).hexdigest()
    assert digest == "b36453a309bed098a5cdc391f8684a3e21f8469630fd8be7a916da0df34a4275"


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="3 tokens for sequences of 4"):
        sequence_features(np.arange(3), np.array([4]))
    with pytest.raises(ValueError, match=">= 0"):
        features_of([np.array([1, -1])])
