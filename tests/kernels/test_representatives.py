"""The choice of representatives in windows, against the slow one."""

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.kernels.representatives import choose_representatives
from luffy.plan.condensation import cosines, representatives, similarity_edges

from .windows import random_windows


@settings(max_examples=100, deadline=None)
@given(
    seed=st.integers(0, 10**6), window=st.sampled_from([1, 2, 16, 33]), causal=st.booleans(), nearest=st.booleans(),
    threshold=st.sampled_from([0.5, 0.8, 0.95, 1.5]),
)  # fmt: skip
def test_it_chooses_as_the_reference_does(seed, window, causal, nearest, threshold):
    unit, rows = random_windows(seed, window, torch.float64)
    chosen = choose_representatives(unit, rows, threshold, causal=causal, nearest=nearest)
    for members, places in zip(rows, chosen, strict=True):
        n = int((members >= 0).sum())
        similarity = cosines(unit[members[:n]].numpy())
        expected = representatives(
            similarity_edges(similarity, threshold, causal), similarity, causal=causal, nearest=nearest
        )
        # Equal rows make equal similarities up to the last bit: compare what is similar, not which twin it is.
        got = places[:n].numpy()
        assert ((got == np.arange(n)) == (expected == np.arange(n))).all()
        np.testing.assert_allclose(
            similarity[got, np.arange(n)], similarity[expected, np.arange(n)], atol=1e-12 if nearest else 2
        )
        if not nearest:
            assert (got == expected).all()
        assert (places[n:] == torch.arange(n, window)).all()


def test_a_row_of_nan_or_zeros_represents_itself_alone():
    unit = torch.ones(5, 4) / 2
    unit[1], unit[3, 2] = 0, torch.nan
    rows = torch.tensor([[0, 1, 2, 3, 4, -1]])
    for causal in (True, False):
        got = choose_representatives(unit, rows, 0.9, causal=causal, nearest=True)
        assert got.tolist() == [[0, 1, 0, 3, 0, 5]]


def test_no_windows_and_no_rows():
    assert choose_representatives(torch.ones(3, 4), torch.zeros(0, 16, dtype=torch.int64), 0.5, causal=True,
                                  nearest=True).shape == (0, 16)  # fmt: skip
    empty = torch.full((2, 16), -1)
    got = choose_representatives(torch.ones(1, 4), empty, 0.5, causal=True, nearest=True)
    assert (got == torch.arange(16)).all()
