"""Properties of the slow reference, which the fast path is held to elsewhere."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.plan.condensation import cosines, filtered, paper_threshold, representatives, similarity_edges


def rows(seed: int, n: int, clusters: int, spread: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(clusters, 6))
    return centres[rng.integers(clusters, size=n)] + spread * rng.normal(size=(n, 6))


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6), n=st.integers(0, 40), clusters=st.integers(1, 6),
    spread=st.sampled_from([0, 0.1, 0.5]),
    threshold=st.sampled_from([-1.0, 0.3, 0.9, 1.5]), causal=st.booleans(), nearest=st.booleans(),
    recount=st.booleans(),
)  # fmt: skip
def test_everyone_is_represented_at_the_threshold_or_represents_itself(
    seed, n, clusters, spread, threshold, causal, nearest, recount
):
    similarity = cosines(rows(seed, n, clusters, spread))
    edges = similarity_edges(similarity, threshold, causal)
    leader = representatives(edges, similarity, causal=causal, nearest=nearest, recount=recount)
    assert (leader[leader] == leader).all()  # representatives represent themselves: no chains
    for j, i in enumerate(leader):
        assert i == j or (similarity[i, j] >= threshold and (i < j or not causal))
    # Nobody travels who could be represented by an earlier choice: what is kept is a maximal set.
    kept = np.flatnonzero(leader == np.arange(n))
    if causal:
        assert not any(edges[i, j] for i in kept for j in kept)
    # Condensing what was kept changes nothing.
    again = representatives(edges[np.ix_(kept, kept)], similarity[np.ix_(kept, kept)], causal=causal, nearest=nearest)
    assert (again == np.arange(len(kept))).all()
    if threshold > 1:
        assert len(kept) == n


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), n=st.integers(2, 30), threshold=st.sampled_from([0.3, 0.8]))
def test_in_causal_order_nothing_that_comes_later_matters(seed, n, threshold):
    x = rows(seed, n, 3, 0.4)
    whole = representatives(similarity_edges(cosines(x), threshold, True), cosines(x), causal=True, nearest=True)
    for cut in range(1, n):
        y = cosines(x[:cut])
        part = representatives(similarity_edges(y, threshold, True), y, causal=True, nearest=True)
        assert (part == whole[:cut]).all()


def test_the_paper_keeps_the_copy_of_highest_degree_first():
    #  0 - 1 - 2 - 3, and 2 - 4: degrees 1 2 3 1 1
    edges = np.zeros((5, 5), dtype=bool)
    for i, j in ((0, 1), (1, 2), (2, 3), (2, 4)):
        edges[i, j] = edges[j, i] = True
    leader = representatives(edges, edges.astype(float), causal=False, nearest=False)
    assert leader.tolist() == [0, 2, 2, 2, 2]
    # Without its neighbour, 0 has nobody left to follow.
    assert representatives(edges[:2, :2], np.eye(2), causal=False, nearest=False).tolist() == [0, 0]


def test_counting_degrees_again_keeps_about_as_many():
    once, again = 0, 0
    for seed in range(20):
        similarity = cosines(rows(seed, 60, 5, 0.5))
        edges = similarity_edges(similarity, 0.8, False)
        for recount in (False, True):
            leader = representatives(edges, similarity, causal=False, nearest=False, recount=recount)
            kept = (leader == np.arange(60)).sum()
            once, again = once + kept * (not recount), again + kept * recount
    assert abs(once - again) < 0.05 * again


def test_zeros_and_nan_are_like_nothing():
    x = np.ones((4, 3))
    x[1] = 0
    x[2, 0] = np.nan
    leader = representatives(similarity_edges(cosines(x), 0.5, True), cosines(x), causal=True, nearest=True)
    assert leader.tolist() == [0, 1, 2, 0]


def test_the_history_filter_and_the_papers_threshold():
    before = np.array([0.9, 0.8, 0.5, 0.2, 0.1, np.nan])
    assert filtered(np.full(6, 0.6), before).tolist() == [1, 0.6, 0.6, 0.6, 0, 0.6]
    assert paper_threshold(8.0, 8.0) == 0.5
    assert paper_threshold(8.0, 0.0) == pytest.approx(1 / (1 + math.e))
