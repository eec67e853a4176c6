"""Predictions against loops over tokens and pairs of ranks."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.plan.prediction import counted_steps, exchange_seconds, predict
from luffy.plan.replay import Wire, deal, spread_evenly
from luffy.plan.topology import Topology, parse_topology
from luffy.plan.trace import TraceStep

E, K, LAYERS = 8, 2, 3


def a_step(seed: int, number: int = 1, sequences: int = 8) -> TraceStep:
    rng = np.random.default_rng(seed)
    lengths = rng.integers(1, 9, sequences)
    T = int(lengths.sum())
    chosen = np.argsort(rng.random((LAYERS, T, E)), axis=2)[:, :, :K]
    return TraceStep(number, lengths, np.zeros(sequences, dtype=np.int64), chosen, chosen[1:])


def busiest(pairs: dict[tuple[int, int], int], topology: Topology) -> float:
    """Seconds of one exchange, of bytes by (from, to), rank by rank and class by class."""
    slowest = latency = 0.0
    rates = {1: topology.intra_node_bytes_per_second, 2: topology.inter_node_bytes_per_second}
    for link, rate in rates.items():
        over = {k: v for k, v in pairs.items() if topology.link_class(*k) == link and v}
        for rank in range(topology.world_size):
            for end in (0, 1):
                slowest = max(slowest, sum(v for k, v in over.items() if k[end] == rank) / rate)
        if over:
            latency = max(latency, topology.latency_seconds[link])
    return slowest + latency


@given(st.integers(0, 10**6), st.sampled_from(["pairs", "ranks"]), st.sampled_from(["4", "2x2", "4x2", "1"]))
@settings(max_examples=40, deadline=None)
def test_bytes_and_seconds_of_staying_equal_a_loop_over_tokens(seed, copies, shape):
    topology = parse_topology(f"{shape}:intra=8GB/s,inter=1GB/s,intra_latency=1us,inter_latency=20us")
    N, step, row = topology.world_size, a_step(seed), 100
    owners = spread_evenly(LAYERS, E, N)
    got = predict("x", [step], owners, Wire(topology, row, copies=copies))
    homes = np.repeat(deal(len(step.lengths), N), step.lengths)
    by_class, seconds = [0, 0, 0], 0.0
    for layer in range(LAYERS):
        pairs: dict[tuple[int, int], int] = {}
        for token, home in enumerate(homes):
            ranks = [int(owners[layer, e]) for e in step.chosen[layer, token]]
            for rank in ranks if copies == "pairs" else set(ranks):
                pairs[int(home), rank] = pairs.get((int(home), rank), 0) + row
                by_class[topology.link_class(int(home), rank)] += row
        seconds += 4 * busiest(pairs, topology)  # there and back, forward and backward
    assert list(got.dispatch) == list(got.combine) == [2 * n for n in by_class]
    assert got.exchange_seconds == pytest.approx(seconds, rel=1e-12)
    assert got.moved_share == 0


def test_a_sequence_that_moves_saves_what_its_new_home_already_has():
    """Two sequences that each want the other's rank: after moving, nothing comes back over a link."""
    topology = Topology.flat(2, 1000.0)
    chosen = np.array([[[1], [1], [0], [0]]])
    step = TraceStep(1, np.array([2, 2]), np.array([0, 1]), chosen, chosen[1:])
    owners = np.array([[0, 1]])
    stay, best = (predict(s, [step], owners, Wire(topology, 10, strategy=s)) for s in ("stay", "best"))
    assert (stay.dispatch[1], stay.combine[1], stay.exchange_seconds) == (80, 80, 0.08)
    assert (best.dispatch[1], best.combine[1], best.exchange_seconds) == (80, 0, 0.04)
    assert best.moved_share == 1


def test_the_latency_of_a_class_that_nothing_uses_is_not_paid():
    topology = Topology(4, 2, 1e9, 1e9, (0.0, 1.0, 100.0))
    rows = np.zeros((1, 4), dtype=np.int64)
    assert exchange_seconds(rows, np.array([0]), 1, topology) == 0
    rows[0, 1] = 1
    assert exchange_seconds(rows, np.array([0]), 1, topology) == pytest.approx(1.0)
    rows[0, 2] = 1
    assert exchange_seconds(rows, np.array([0]), 1, topology) == pytest.approx(100.0)


def test_rehoming_is_fitted_to_steps_that_are_not_counted_and_helps_where_routing_repeats():
    """Every sequence wants one expert, the same in all layers and steps, and never the one that it stands beside."""
    lengths = np.full(8, 4)
    wanted = np.repeat(np.arange(8)[::-1], 4)
    chosen = np.tile(wanted[None, :, None], (LAYERS, 1, 1))
    steps = [TraceStep(n, lengths, np.zeros(8, dtype=np.int64), chosen, chosen[1:]) for n in range(1, 9)]
    wire = Wire(Topology.flat(4), 10)
    owners = spread_evenly(LAYERS, E, 4)
    dealt, rehomed = (predict("x", steps, owners, wire, rehome=r) for r in (False, True))
    assert [s.step for s in counted_steps(steps)] == [7, 8]
    assert dealt.num_bytes[0] > 0 and rehomed.num_bytes[0] == 0 and rehomed.rehomed
    assert not predict("x", steps[:3], owners, wire, rehome=True).rehomed


def test_no_steps_are_refused():
    with pytest.raises(ValueError, match="recorded steps"):
        predict("x", [], spread_evenly(1, 2, 2), Wire(Topology.flat(2), 1))
