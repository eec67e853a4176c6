"""The predictor: it finds what is there, in integers that every processor and every rank agrees on."""

import numpy as np
import pytest
import torch

from luffy.comm import Comm, build_mesh
from luffy.seats.features import DIM, features_of
from luffy.seats.predictor import FADE, RowPredictor
from luffy.seats.sharing import learn_together
from luffy.testing import run_ranks

N = 4


def planted(seed: int, num: int = 400) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences of four domains, of token ids that lean to their domain, and rows that lean to its rank."""
    rng = np.random.default_rng(seed)
    domain, lengths = rng.integers(0, N, num), rng.integers(20, 200, num)
    tokens = []
    for d, n in zip(domain, lengths, strict=True):
        own, common = d * 100 + rng.integers(0, 100, n), rng.integers(400, 900, n)
        tokens.append(np.where(rng.random(n) < 0.3, own, common))
    share = np.full((num, N), 0.8)
    share[np.arange(num), domain] = 2.5
    return features_of(tokens), lengths, np.rint(share * lengths[:, None]).astype(np.int64)


def fitted(seed: int = 0) -> RowPredictor:
    predictor = RowPredictor(N)
    predictor.observe(*planted(seed))
    assert predictor.solve()
    return predictor


def test_rows_of_other_sequences_are_foretold():
    features, lengths, rows = planted(1)
    found = fitted().predict(features, lengths)
    assert (found.dtype, found.shape) == (np.int64, rows.shape)
    assert (found.argmax(1) == rows.argmax(1)).mean() > 0.95
    assert np.abs(found.sum(0) - rows.sum(0)).max() < 0.05 * rows.sum(0).max()
    mean = np.rint(rows.sum(0) / lengths.sum() * lengths[:, None])
    assert np.abs(found - rows).sum() < 0.5 * np.abs(mean - rows).sum()


def test_predictions_are_whole_numbers_counted_exactly():
    predictor = fitted()
    features, lengths, _ = planted(2, 20)
    found = predictor.predict(features, lengths)
    constant, *slope = predictor.coefficients.tolist()
    for s in range(20):
        for r in range(N):
            per_token = constant[r] + sum(int(x) * slope[i][r] for i, x in enumerate(features[s]))
            assert found[s, r] == (max(0, per_token) * int(lengths[s]) + (1 << 27)) >> 28
    assert np.abs(predictor.coefficients[1:]).max() * DIM * 2**15 <= 2**53


def test_what_a_sequence_counts_is_its_tokens():
    """Two halves of the moments of one sequence are its own: a sequence of length 2 n is two of length n."""
    features, lengths, rows = planted(3)
    once, twice = RowPredictor(N), RowPredictor(N)
    once.observe(features, 2 * lengths, 2 * rows)
    for _ in range(2):
        twice.observe(features, lengths, rows)
    np.testing.assert_array_equal(once.moments, twice.moments)


def test_old_sequences_fade_and_moved_experts_are_forgotten():
    features, lengths, rows = planted(4)
    predictor, new = fitted(5), RowPredictor(N)
    new.observe(features, lengths, rows)
    before = predictor.moments.copy()
    predictor.fade()
    np.testing.assert_array_equal(predictor.moments, FADE * before)
    predictor.forget()
    assert predictor.coefficients is None and not predictor.solve()
    predictor.observe(features, lengths, rows)
    np.testing.assert_array_equal(predictor.moments, new.moments)


def test_a_state_goes_on_to_the_bit_and_one_of_other_ranks_is_none():
    predictor, other = fitted(), RowPredictor(N)
    assert other.load(predictor.state())
    more = planted(6)
    for p in (predictor, other):
        p.fade()
        p.observe(*more)
        p.solve()
    np.testing.assert_array_equal(predictor.coefficients, other.coefficients)
    wider = RowPredictor(2 * N)
    assert not wider.load(predictor.state())
    assert wider.coefficients is None and not wider.moments.any()
    assert not other.load({})
    with pytest.raises(ValueError, match="fitted before"):
        other.predict(more[0], more[1])


def learn(rank: int, ep_size: int) -> dict:
    comm = Comm.create(build_mesh(torch.device("cpu"), ep_size))
    predictor, seen, found = RowPredictor(N), RowPredictor(N), []
    found.append(learn_together(predictor, seen, comm))  # nothing yet
    for turn in range(2):
        features, lengths, rows = planted(10 + turn)
        mine = np.arange(len(lengths)) % comm.mesh.world_size == rank
        if rank == 1 and turn:
            mine[:] = False  # a rank may have nothing
        seen.observe(features[mine], lengths[mine], rows[mine])
        found.append(learn_together(predictor, seen, comm))
        assert not seen.moments.any()
    return {"found": found, **{k: v.numpy() for k, v in predictor.state().items()}}


@pytest.mark.parametrize(("world", "ep_size"), [(2, 2), (4, 2)])
def test_all_ranks_learn_one_predictor_from_what_each_saw(world: int, ep_size: int):
    answers = run_ranks(learn, world, ep_size)
    expected = RowPredictor(N)
    for turn in range(2):
        features, lengths, rows = planted(10 + turn)
        counted = np.arange(len(lengths)) % world != (1 if turn else -1)
        expected.fade()
        expected.observe(features[counted], lengths[counted], rows[counted])
    expected.solve()
    for a in answers:
        assert a["found"] == [False, True, True]
        np.testing.assert_allclose(a["moments"], expected.moments, rtol=1e-12)
        np.testing.assert_array_equal(a["coefficients"], answers[0]["coefficients"])
        np.testing.assert_allclose(a["coefficients"], expected.coefficients, atol=2)
