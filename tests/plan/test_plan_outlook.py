"""What the first layer's choices foretell: rows by hand, the same integers in any order, and topics that are learnt."""

from dataclasses import replace

import numpy as np
import pytest

from luffy.plan.mapping import plan_mapping
from luffy.plan.outlook import expected_rows, learn_outlook
from luffy.plan.replay import Wire, replay_step, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep

E, LAYERS, RANKS = 8, 5, 4
ONE = 1 << 20


def recorded(seed: int, loyalty: float = 0.8, sequences: int = 64) -> TraceStep:
    """Sequences of four topics; each layer has two experts for each, elsewhere in every layer."""
    rng = np.random.default_rng(seed)
    experts = np.stack([np.random.default_rng(100 + layer).permutation(E) for layer in range(LAYERS)])
    lengths = rng.integers(5, 40, sequences)
    topic = np.repeat(rng.integers(0, 4, sequences), lengths)
    chosen = np.empty((LAYERS, len(topic), 2), dtype=np.int16)
    for layer in range(LAYERS):
        for k in range(2):
            loyal = rng.random(len(topic)) < loyalty
            chosen[layer, :, k] = experts[layer, np.where(loyal, 2 * topic + k, rng.integers(0, E, len(topic)))]
    chosen[rng.random(chosen.shape) < 0.02] = -1
    return TraceStep(seed, lengths, np.arange(sequences) * RANKS // sequences, chosen, chosen[1:])


def test_rows_are_those_of_independent_choices():
    """One sequence of ten tokens; experts 0 and 1 are of one rank: half and half of its tokens give three quarters."""
    outlook = np.zeros((E, 2, E), dtype=np.int64)
    outlook[0, 0, [0, 1]] = ONE // 2
    outlook[0, 1, 7] = 3 * ONE  # more than there are tokens
    counts = np.zeros((1, E), dtype=np.int64)
    counts[0, 0] = 10
    rows = expected_rows(outlook, counts, np.array([10]), np.tile(np.arange(E) // 2, (2, 1)), RANKS)
    assert rows.tolist() == [[8, 0, 0, 10]]  # 7.5, to even
    moved = np.stack([np.array([0, 1, 2, 3, 0, 1, 2, 3]), np.arange(E) // 2])
    assert expected_rows(outlook, counts, np.array([10]), moved, RANKS).tolist() == [[5, 5, 0, 10]]


def test_an_empty_sequence_a_negative_forecast_and_a_model_of_one_layer():
    outlook = np.full((E, 1, E), -ONE)
    rows = expected_rows(outlook, np.ones((2, E), dtype=np.int64), np.array([0, 4]), np.arange(E)[None] // 2, RANKS)
    assert not rows.any()
    one = TraceStep(0, np.array([3]), np.array([0]), np.zeros((1, 3, 2), np.int16), np.zeros((0, 3, 2), np.int16))
    learnt = learn_outlook([one], E)
    assert learnt.shape == (E, 0, E)
    none = expected_rows(learnt, np.ones((1, E), dtype=np.int64), np.array([3]), np.zeros((0, E), np.int64), RANKS)
    assert none.tolist() == [[0] * RANKS]


def test_it_does_not_depend_on_the_order_of_sequences_nor_on_who_else_is_there():
    step = recorded(1)
    outlook, counts = learn_outlook([recorded(2)], E), step.counts_by_expert(0, E)
    owners = np.stack([np.random.default_rng(i).permutation(E) % RANKS for i in range(LAYERS - 1)])
    rows = expected_rows(outlook, counts, step.lengths, owners, RANKS)
    order = np.random.default_rng(3).permutation(len(counts))
    for some in (order, order[:1]):
        alone = expected_rows(outlook, counts[some], step.lengths[some], owners, RANKS)
        np.testing.assert_array_equal(alone, rows[some])


def test_it_foretells_topics_on_steps_that_it_has_not_seen():
    outlook, step = learn_outlook([recorded(s) for s in range(4)], E), recorded(9)
    owners = np.tile(np.arange(E) // 2, (LAYERS, 1))
    rows = expected_rows(outlook, step.counts_by_expert(0, E), step.lengths, owners[1:], RANKS)
    real = sum(step.count_by_sequence(np.where(c >= 0, owners[0][c], -1), RANKS) for c in step.chosen[1:])
    ignorant = real.sum(1, keepdims=True) / RANKS  # who knows nothing expects as much at every rank
    assert np.abs(rows - real).sum() < 0.5 * np.abs(ignorant - real).sum()


@pytest.mark.parametrize("settles", [True, False])
def test_settling_sends_about_what_moving_behind_every_layer_does(settles):
    """With experts re-homed for it; and by what is foretold, not by what really comes."""
    steps = [recorded(s) for s in range(8)]
    owners = spread_evenly(LAYERS, E, RANKS)
    links = Topology(RANKS, RANKS, 1e9, 1e9)
    wire = Wire(links, 64, "best", "none" if settles else "router", settles=settles)
    plan = plan_mapping(steps[:4], steps[4:6], owners, wire, expert_num_bytes=1, steps_until_next=1000)
    assert plan.pays
    told = replace(wire, outlook=learn_outlook(steps[:4], E)) if settles else wire
    stay = Wire(links, 64)

    def crossing(mapping: np.ndarray, way: Wire) -> int:
        return sum(sum(x.dispatch[1:]) + sum(x.combine[1:]) for s in steps[6:] for x in replay_step(s, mapping, way))

    rows = crossing(plan.owners, told) / crossing(owners, stay)
    assert rows < 0.62, rows
    if settles:
        replays = [replay_step(s, plan.owners, told) for s in steps[6:]]
        assert all((x.homes_before == x.homes_after).all() for r in replays for x in r[1:])
        knowing = crossing(plan.owners, wire) / crossing(owners, stay)
        assert knowing <= rows < 1.1 * knowing
