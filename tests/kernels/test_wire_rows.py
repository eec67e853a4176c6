"""Coded rows in one pass: the kernels (interpreted) against their references, and what random rounding promises."""

import pytest
import torch

from luffy.kernels.wire_rows import LARGEST, add_rows, decode_rows, encode_rows

from .interpreted import interpret
from .wired import hard_rows


@pytest.mark.slow
def test_the_kernels_agree_with_their_references_in_tritons_interpreter():
    assert "cases agree" in interpret("wired")


@pytest.mark.parametrize("name", LARGEST)
def test_chunks_gathering_and_adding_are_what_doing_it_row_by_row_gives(name):
    """More rows than one chunk, coded at random too: the hash goes by a row's place in the message, not in a chunk."""
    D = 800
    x = hard_rows(400, D, torch.float32)[5:]
    index = torch.randint(len(x), (700,), generator=torch.Generator().manual_seed(1))
    for seed in (None, 7):
        coded = encode_rows(x, index, name, seed)
        assert torch.equal(coded, encode_rows(x[index], None, name, seed))
        if seed is None:
            assert torch.equal(coded, torch.cat([encode_rows(x[i : i + 1], None, name) for i in index]))
        values = decode_rows(coded, D, name, torch.float32)
        total = add_rows(torch.ones(9, D), index % 9, coded, name)
        expected = torch.ones(9, D)
        for i, row in zip(index % 9, values, strict=True):
            expected[i] += row
        torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-3)


def rounded(x: torch.Tensor, name: str, seed: int | None = None) -> torch.Tensor:
    return decode_rows(encode_rows(x, None, name, seed), x.shape[1], name, torch.float64)


@pytest.mark.parametrize("name", LARGEST)
def test_random_rounding_gives_the_value_in_the_mean_and_repeats_itself(name):
    x = torch.randn(6, 64, generator=torch.Generator().manual_seed(2))
    draws = torch.stack(
        [decode_rows(encode_rows(x, None, name, s), 64, name, torch.float64) for s in range(0, 10**8, 10**5)]
    )
    step = x.unflatten(1, (-1, 32)).abs().amax(2, keepdim=True) / LARGEST[name] * 1.01
    step = step.expand(-1, -1, 32).flatten(1)
    assert ((draws - x).abs() < step * (1 + 1e-3)).all()  # one of its two neighbours, always
    off = (draws.mean(0) - x) / step
    # A draw is off by at most half a step in the mean square; the mean of 1000 by 0.016, and 5 such are rare.
    assert off.abs().max() < 5 * 0.5 / 1000**0.5
    assert abs(float(off.mean())) < 5 * 0.5 / (1000 * x.numel()) ** 0.5
    assert torch.equal(encode_rows(x, None, name, 3), encode_rows(x, None, name, 3))
    if name != "int16":  # whose steps are below what the two draws differ by only now and then
        assert (encode_rows(x, None, name, 3) != encode_rows(x, None, name, 4)).any()


def test_rounding_to_nearest_is_not_unbiased_and_the_test_would_see_it():
    x = torch.full((1, 32), 0.3)
    x[0, 0] = 7.0
    nearest = rounded(x, "int4")
    assert (nearest[0, 1:] == 0).all()
    draws = [
        decode_rows(encode_rows(x, None, "int4", s), 32, "int4", torch.float64)[0, 1:] for s in range(0, 40000, 97)
    ]
    assert abs(float(torch.stack(draws).mean()) - 0.3) < 0.02
