import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from luffy.plan.cost import SCORE_COSTS, AttentionCost, fit_attention_cost


def test_the_formula_of_the_paper():
    cost = AttentionCost(hidden_size=768)
    B, L, d = 4, 1024, 768
    operations = 3 * B * L * d**2 + 2 * B * L**2 * d
    assert int(cost.padded_flops(B, L)) == int(cost.sequence_flops([L] * B).sum()) == operations


@given(st.lists(st.integers(0, 4096), min_size=1, max_size=8))
def test_padding_never_saves(lengths):
    cost = AttentionCost(64)
    assert cost.padded_flops(len(lengths), max(lengths)) >= cost.sequence_flops(lengths).sum()


def test_scores_may_cost_more_or_less_than_projections():
    B, L, d = 3, 100, 16
    for score_cost, factor in ((64, 1), (256, 4), (32, 0.5)):
        cost = AttentionCost(d, 1e9, score_cost)
        assert int(cost.padded_flops(B, L)) == B * L * (3 * d * d + factor * 2 * d * L)
        assert int(cost.sequence_flops([L, L]).sum()) == 2 * L * (3 * d * d + factor * 2 * d * L)
    assert AttentionCost(1, score_cost=1).padded_flops(4, 31) == 4 * 31 * 3  # whole operations, rounded down


def test_large_batches_do_not_overflow():
    flops = AttentionCost(16384).padded_flops(4096, 131072)
    assert int(flops) == 4096 * 131072 * (3 * 16384**2 + 2 * 16384 * 131072)


def test_nonsense_rates():
    with pytest.raises(ValueError, match="positive"):
        AttentionCost(0, 1e12)
    with pytest.raises(ValueError, match="positive"):
        AttentionCost(8, 0)
    with pytest.raises(ValueError, match="positive"):
        AttentionCost(8, score_cost=0)


def samples(rate, overhead, noise=0.0, hidden_size=768):
    model, rng = AttentionCost(hidden_size), np.random.default_rng(0)
    for B in (1, 2, 8):
        for L in (128, 512, 2048):
            seconds = float(model.padded_flops(B, L)) / rate + overhead
            yield B, L, seconds * (1 + noise * rng.standard_normal())


@pytest.mark.parametrize("overhead", [0.0, 50e-6])
def test_fit_recovers_rate_and_overhead(overhead):
    fit = fit_attention_cost(768, list(samples(7.2e13, overhead)))
    assert fit.flops_per_second == pytest.approx(7.2e13, rel=1e-6)
    assert fit.overhead_seconds == pytest.approx(overhead, abs=1e-9)
    assert fit.max_relative_error < 1e-6 and fit.num_samples == 9
    assert fit.attention_cost(768).flops_per_second == fit.flops_per_second


def test_fit_reports_the_noise_it_saw():
    fit = fit_attention_cost(768, list(samples(7.2e13, 50e-6, noise=0.05)))
    assert fit.flops_per_second == pytest.approx(7.2e13, rel=0.15)
    assert 0.005 < fit.median_relative_error < 0.1 <= 2 * fit.max_relative_error


@pytest.mark.parametrize("score_cost", SCORE_COSTS)
def test_fit_finds_the_second_rate_only_if_asked(score_cost):
    model = AttentionCost(64, score_cost=score_cost)
    data = [(B, L, float(model.padded_flops(B, L)) / 1e11 + 1e-5) for B in (1, 4, 16) for L in (64, 256, 1024)]
    fit = fit_attention_cost(64, data, SCORE_COSTS)
    assert fit.score_cost == score_cost and fit.flops_per_second == pytest.approx(1e11, rel=1e-6)
    assert fit.attention_cost(64) == AttentionCost(64, fit.flops_per_second, score_cost)
    assert fit_attention_cost(64, data).score_cost == 64
    assert fit_attention_cost(64, data[:3], SCORE_COSTS).score_cost == 64  # three points prove nothing


def test_a_second_rate_must_halve_the_error():
    def squared_error(fit, data):
        B, L, seconds = np.array(data).T
        flops = fit.attention_cost(768).padded_flops(B, L)
        return float(np.square(fit.seconds(flops) / seconds - 1).sum())

    second_rates = 0
    for seed in range(20):
        rng = np.random.default_rng(seed)
        noisy = [(B, L, s * (1 + 0.05 * rng.standard_normal())) for B, L, s in samples(7.2e13, 50e-6)]
        one, two = fit_attention_cost(768, noisy), fit_attention_cost(768, noisy, SCORE_COSTS)
        if two.score_cost == 64:
            assert two == one
        else:
            second_rates += 1
            assert 2 * squared_error(two, noisy) <= squared_error(one, noisy)
    assert second_rates <= 4  # noise alone seldom makes one


def test_fit_with_one_sample_has_no_overhead():
    fit = fit_attention_cost(768, [(1, 128, 0.001)])
    assert fit.overhead_seconds == 0 and fit.max_relative_error == pytest.approx(0)


def test_fit_never_reports_a_negative_overhead():
    faster_when_small = [(B, L, s - 5e-7) for B, L, s in samples(1e12, 0.0)]
    assert fit_attention_cost(768, faster_when_small).overhead_seconds == 0


@pytest.mark.parametrize(
    ("bad", "complaint"),
    [
        ([], "no measured"),
        ([(1, 128, -1.0)], "positive"),
        ([(1, 128, float("nan"))], "positive"),
        ([(1, 128, 1.0), (8, 1024, 0.001)], "does not grow"),
    ],
)
def test_fit_refuses_nonsense(bad, complaint):
    with pytest.raises(ValueError, match=complaint):
        fit_attention_cost(64, bad)
