"""How good `best` is, against `exact` and against the definitions of its parts."""

import itertools
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.plan.cyclic import exchange
from luffy.plan.exact import assign
from luffy.plan.placement import Balance, PlacementProblem, plan_placement, weighted_bytes
from luffy.plan.prices import clearing_prices
from luffy.plan.seating import seat
from luffy.plan.synthetic import synthetic_counts
from luffy.plan.traffic import benefit_matrix, bottleneck_femtoseconds

from .problems import make_problem, topology


def gap(problem, **options):
    """Weighted bytes of `best` above those of `exact`, as a share."""
    best = plan_placement("best", problem, **options)
    best.check(problem)
    return (
        weighted_bytes(problem, best.new_home) / weighted_bytes(problem, plan_placement("exact", problem).new_home) - 1
    )


@pytest.mark.parametrize("popularity", [0.0, 0.7])
@pytest.mark.parametrize("num_domains", [0, 1, 8])
@pytest.mark.parametrize(
    ("S", "N", "ranks_per_node"), [(64, 8, 8), (64, 16, 4), (256, 16, 16), (256, 32, 8), (256, 64, 1)]
)
def test_within_two_percent_of_the_optimum(S, N, ranks_per_node, num_domains, popularity):
    for seed in range(3):
        counts = synthetic_counts(S, N, seed=seed, num_domains=num_domains, popularity=popularity)
        problem = PlacementProblem(
            counts, np.full(S, 1024), np.arange(S) % N, topology(N, ranks_per_node), row_num_bytes=1536
        )
        assert 0 <= gap(problem) < 0.02
        assert gap(problem, rounds=200) == 0
        assert plan_placement("best", problem, rounds=200).optimal


def test_within_two_percent_at_full_size():
    problem = make_problem(1024, 64, seed=3, ranks_per_node=8)
    assert gap(problem) < 0.02
    default, long = plan_placement("best", problem), plan_placement("best", problem, rounds=200)
    assert weighted_bytes(problem, long.new_home) <= weighted_bytes(problem, default.new_home)


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 60), st.sampled_from([2, 3, 8]), st.integers(0, 10_000), st.booleans())
def test_random_problems_reach_the_optimum(S, N, seed, two_nodes):
    rng = np.random.default_rng(seed)
    problem = PlacementProblem(
        rng.integers(0, 100, (S, N)),
        rng.integers(0, 100, S),
        rng.integers(0, N, S),
        topology(N, N // 2 if two_nodes and N % 2 == 0 else N),
        row_num_bytes=64,
        next_counts=rng.integers(0, 100, (S, N)),
    )
    plan = plan_placement("best", problem, rounds=500)
    padded_too_far = problem.quotas.max() * np.count_nonzero(problem.quotas) > 8 * S
    assert plan.optimal or padded_too_far
    if plan.optimal:
        assert gap(problem, rounds=500) == 0


@pytest.mark.parametrize("counts", [np.zeros((64, 16), int), np.full((64, 16), 7)])
def test_nothing_moves_for_nothing(counts):
    problem = PlacementProblem(counts, np.full(64, 16), np.arange(64) % 16, topology(16, 4), row_num_bytes=8)
    assert plan_placement("best", problem).num_moved == 0


def test_identical_sequences_are_no_trouble():
    counts = np.tile(np.random.default_rng(0).integers(0, 100, 32), (512, 1))
    problem = PlacementProblem(counts, np.full(512, 99), np.arange(512) % 32, topology(32), row_num_bytes=8)
    assert gap(problem) == 0


def test_the_bottleneck_falls_with_the_total():
    problem = make_problem(256, 16, seed=1)
    stay, best = (plan_placement(name, problem) for name in ("stay", "best"))
    assert bottleneck_femtoseconds(problem, best.new_home) < bottleneck_femtoseconds(problem, stay.new_home)
    weighted = plan_placement("best", problem, bottleneck_weight=0.5, rounds=50)
    weighted.check(problem)
    plain = plan_placement("best", problem, rounds=50)
    assert bottleneck_femtoseconds(problem, weighted.new_home) <= bottleneck_femtoseconds(problem, plain.new_home)
    assert weighted_bytes(problem, weighted.new_home) < weighted_bytes(problem, plain.new_home) * 1.005


def test_prices_of_the_same_batch_start_at_the_optimum():
    problem = make_problem(256, 16, seed=4, ranks_per_node=4)
    first = plan_placement("best", problem, rounds=100)
    assert first.prices is not None and first.prices.shape == (16,) and first.prices.min() == 0
    again = plan_placement("best", problem, rounds=3, prices=first.prices)
    assert weighted_bytes(problem, again.new_home) < weighted_bytes(problem, first.new_home) * 1.001
    again.check(problem)


@pytest.mark.parametrize("prices", [np.zeros(16), np.full(16, 1e30), np.array([1e30] + [0] * 15), np.full(16, np.inf)])
def test_bad_prices_cost_quality_at_most(prices):
    problem = make_problem(64, 16, seed=4)
    plan = plan_placement("best", problem, prices=prices)
    plan.check(problem)


def test_prices_nearly_clear_the_market():
    for ranks_per_node in (32, 8):
        problem = make_problem(1024, 32, seed=1, ranks_per_node=ranks_per_node)
        benefit = benefit_matrix(problem, 27)
        over = {}
        for name, prices in {"none": 0, "clearing": clearing_prices(benefit, problem.quotas)}.items():
            demand = np.bincount((benefit.values - prices).argmax(axis=1), minlength=32)
            over[name] = np.maximum(demand - problem.quotas, 0).sum()
        assert over["clearing"] < over["none"] / 2


@pytest.mark.parametrize("quotas", [[8, 8, 8, 8], [5, 9, 8, 10], [32, 0, 0, 0], [0, 1, 15, 16]])
def test_seating_fills_every_quota(quotas):
    rng = np.random.default_rng(0)
    for spread in (1, 3, 1000):
        benefit = rng.integers(0, spread, (32, 4)).astype(np.int32)
        assigned = seat(benefit, np.array(quotas), np.repeat(np.arange(4), quotas))
        assert np.bincount(assigned, minlength=4).tolist() == quotas


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 10_000), st.lists(st.integers(1, 3), min_size=2, max_size=4))
def test_exchange_never_loses_and_ends_at_the_optimum(seed, quotas):
    rng = np.random.default_rng(seed)
    quotas = np.array(quotas)
    S, N = quotas.sum(), len(quotas)
    benefit = rng.integers(-20, 20, (S, N)).astype(np.int32)
    assigned = rng.permutation(np.repeat(np.arange(N), quotas))
    value = [benefit[np.arange(S), assigned].sum()]
    for rounds in (1, 2, 100):
        result = exchange(benefit, assigned, quotas, rounds)
        assert (np.bincount(result.assigned, minlength=N) == quotas).all()
        value.append(benefit[np.arange(S), result.assigned].sum())
    assert value == sorted(value)
    assert result.optimal
    if S <= 7:
        ways = set(itertools.permutations(assigned.tolist()))
        assert value[-1] == max(sum(benefit[s, r] for s, r in enumerate(way)) for way in ways)
    assert value[-1] == benefit[np.arange(S), assign(benefit.astype(np.int64), quotas)].sum()


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("slack", [0.0, 0.1])
def test_uneven_lengths_still_save_most_of_the_traffic(layout, slack):
    """No optimum is known; taking the best rank for every sequence, whatever the load, bounds it from below."""
    for seed in (1, 2):
        problem = make_problem(128, 8, seed=seed, uneven=True, layout=layout, balance=Balance("tokens", slack))
        stay, best = (weighted_bytes(problem, plan_placement(name, problem).new_home) for name in ("stay", "best"))
        bound = weighted_bytes(problem, problem.counts.argmax(axis=1))
        assert stay - best > 0.6 * (stay - bound)


def test_uneven_lengths_with_no_room_at_all_improve_by_swaps():
    """Every rank holds one long and one short sequence and no slack: only swaps of like with like are possible."""
    N = 8
    lengths = np.repeat([100, 10], N)
    home = np.tile(np.arange(N), 2)
    favourite = np.roll(np.arange(N), 3)
    counts = np.ones((2 * N, N), int)
    counts[np.arange(2 * N), np.tile(favourite, 2)] = np.repeat([60, 6], N)
    problem = PlacementProblem(counts, lengths, home, topology(N), 8, balance=Balance("tokens", 0.0))
    plan = plan_placement("best", problem)
    plan.check(problem)
    assert plan.new_home.tolist() == np.tile(favourite, 2).tolist()


def test_more_rounds_never_cost_more():
    for uneven in (False, True):
        problem = make_problem(128, 8, seed=7, uneven=uneven)
        costs = [
            weighted_bytes(problem, plan_placement("best", replace(problem), rounds=rounds).new_home)
            for rounds in (0, 1, 2, 4, 8, 16)
        ]
        assert costs == sorted(costs, reverse=True)
