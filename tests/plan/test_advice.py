"""Advice: what is worth taking, what is named beside it, and when three other ways to train send less, by hand."""

import itertools

import numpy as np
import pytest

from luffy.plan.advice import (
    MICRO_BATCHES,
    Alternative,
    advise,
    group_sum_seconds,
    offloading,
    pipeline,
    sharded,
    slowest_of_groups,
)
from luffy.plan.prediction import Prediction, predict
from luffy.plan.replay import Wire, replay_step, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep


def of(recipe: str, seconds: float, num_bytes: float = 1.0) -> Prediction:
    return Prediction(recipe, (0, num_bytes, 0), (0, 0, 0), seconds, 0.0, 1)


PREDICTIONS = [of("vanilla", 2.0), of("vanilla_dedup", 1.0), of("luffy", 0.5), of("luffy_max", 0.1)]
LOSSLESS = ["vanilla", "vanilla_dedup", "luffy"]


def test_the_best_lossless_recipe_is_advised_and_a_faster_one_named() -> None:
    advice = advise(PREDICTIONS, LOSSLESS, compute_seconds=0.5)
    assert advice.recipe == "luffy" and advice.gain == 1.5
    assert advice.line == (
        "take luffy: 1.50x the speed of vanilla_dedup; if rows may be rounded, "
        "luffy_max: 2.50x the speed of vanilla_dedup"
    )
    assert "links are busy for 0.50 of the time of vanilla_dedup" in advise(PREDICTIONS, LOSSLESS).line


def test_where_nothing_gains_the_base_is_advised() -> None:
    advice = advise(PREDICTIONS, LOSSLESS, compute_seconds=100.0)
    assert advice.recipe == "vanilla_dedup" and "no lossless recipe gains more than 3%" in advice.line
    assert "luffy_max" not in advice.line
    assert advise([of("luffy", 0.0), of("vanilla", 0.0)], LOSSLESS).recipe == "luffy"  # one rank: no links at all


def test_others_are_named_where_they_win_and_only_there() -> None:
    idle = Alternative("pipeline", 0.1, 0.25)
    assert (
        "Not ours, and less to send: pipeline (links busy for 100 ms, not 500 ms; 25% of the computation idle)"
        in advise(PREDICTIONS, LOSSLESS, [idle], 1.0).line
    )  # 1.25 + 0.1 for 1.0 + 0.5
    assert "Not ours" not in advise(PREDICTIONS, LOSSLESS, [idle], 2.0).line  # 2.5 + 0.1 for 2.0 + 0.5


def test_seconds_of_the_others_by_hand() -> None:
    links = Topology(8, 2, 1e9, 1e8)  # 4 nodes of 2
    found = pipeline(of("vanilla_dedup", 0.8), links, num_tokens=1000, row_num_bytes=100)
    # A quarter of what two ranks would do with all tokens; then 1000 states of 100 bytes over two links, twice.
    assert abs(found.seconds - (0.8 / 4 + 2 * 1000 * 100 / 2 / 1e8)) < 1e-12
    assert found.idle_share == 3 / (4 * MICRO_BATCHES)
    assert found.num_bytes == (1.0, 2 * 3 * 1000 * 100) and found.enough_tokens(1.0, 1000) is None
    weights = 1e9
    by_hand = 2 * 1 / 2 * weights / 1e9 + 2 * 3 / 4 * weights / 2 / 1e8 + 3 * weights / 25e9
    assert abs(offloading(links, weights).seconds - by_hand) < 1e-9
    zero = sharded(links, weights)
    assert abs(zero.seconds - 3 * (1 / 2 * weights / 1e9 + 3 / 4 * weights / 2 / 1e8)) < 1e-9
    assert zero.num_bytes == (8 * 3 * weights / 2, 8 * 3 * weights * 3 / 4 / 2)
    # Busy links of a recipe grow with the tokens, these do not: at twice the tokens both are equal.
    assert zero.enough_tokens(zero.seconds / 2, 1000) == 2000
    assert abs(group_sum_seconds(links, 10, weights) - 2 * 9 / 10 * weights / 8 / 1e8) < 1e-9


def steps_of(num: int, num_experts: int, sequences: int) -> list[TraceStep]:
    rng = np.random.default_rng(5)
    lengths = np.full(sequences, 8)
    chosen = [rng.integers(0, num_experts, (2, 8 * sequences, 2)).astype(np.int16) for _ in range(num)]
    return [TraceStep(n, lengths, np.zeros(sequences, np.int64), c, c[1:]) for n, c in enumerate(chosen)]


def test_groups_are_simulated_as_the_whole_cluster_is() -> None:
    """Two groups of two nodes, replayed as one cluster of four nodes with two sets of experts: its bytes are the sums
    over the groups, link by link, and its seconds lie between the slower group's and both groups' together."""
    E, S, group = 8, 12, Topology(4, 2, 1e9, 1e8)
    steps, whole = steps_of(4, E, S), Topology(8, 2, 1e9, 1e8)
    owners = spread_evenly(2, E, 4)
    wire = Wire(group, 64)
    for first, second in itertools.product(steps, steps):
        both = TraceStep(
            0, np.concatenate([first.lengths, second.lengths]), np.zeros(2 * S, np.int64),
            np.concatenate([first.chosen, second.chosen + E], axis=1),
            np.concatenate([first.foreseen, second.foreseen + E], axis=1),
        )  # fmt: skip
        full = replay_step(both, np.concatenate([owners, owners + 4], axis=1), Wire(whole, 64))
        apart = [replay_step(step, owners, wire) for step in (first, second)]
        for layer, a, b in zip(full, *apart, strict=True):
            assert layer.dispatch == tuple(np.add(a.dispatch, b.dispatch))
            assert layer.combine == tuple(np.add(a.combine, b.combine))
        one, other = (predict("r", [step], owners, wire).exchange_seconds for step in (first, second))
        together = predict("r", [both], np.concatenate([owners, owners + 4], axis=1), Wire(whole, 64))
        # The model of a whole cluster ends each exchange with its busiest rank; groups meet once a step.
        assert max(one, other) <= together.exchange_seconds + 1e-15 <= one + other


def test_the_slowest_of_many_groups_is_the_mean_over_all_ways_to_deal_steps() -> None:
    seconds = (0.3, 0.1, 0.7, 0.2)
    for groups in (1, 2, 5):
        dealt = [max(deal) for deal in itertools.product(seconds, repeat=groups)]
        assert slowest_of_groups(seconds, groups) == pytest.approx(sum(dealt) / len(dealt), rel=1e-12)
    assert slowest_of_groups(seconds, 1250) == pytest.approx(0.7)
