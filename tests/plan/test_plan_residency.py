"""Who holds which expert, and how the weights get there: properties, and FasterMoE's rule said slowly."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.plan.residency import ExpertCosts, at_owners, deliver, expert_traffic, fetched, shadowed
from luffy.plan.topology import Topology


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_every_guest_arrives_once(data: st.DataObject) -> None:
    nodes, width = data.draw(st.integers(1, 3)), data.draw(st.integers(1, 4))
    N, E = nodes * width, data.draw(st.integers(1, 9))
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    owner = rng.integers(0, N, E)
    resident = at_owners(owner, N) | (rng.random((E, N)) < data.draw(st.floats(0, 1)))
    topology, relay = Topology(N, width, 1e9, 1e8), data.draw(st.booleans())
    plan = deliver(resident, owner, topology, relay_at_home=relay)
    plan.check()
    node = np.arange(N) // width
    crossing = plan.first[node[plan.first[:, 0]] != node[plan.first[:, 1]]] if len(plan.first) else plan.first
    # An expert enters another node once, however many want it there; relays never send abroad.
    pairs = {(int(e), int(node[to])) for _, to, e, _ in crossing}
    assert len(crossing) == len(pairs) * plan.parts
    assert (node[plan.second[:, 0]] == node[plan.second[:, 1]]).all()


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 3), st.integers(1, 4), st.integers(1, 9), st.integers(0, 10**6), st.booleans())
def test_traffic_is_that_of_the_delivery(nodes: int, width: int, E: int, seed: int, relay: bool) -> None:
    """By rank, direction and class of link, to within a part of each expert that relays share out."""
    rng, N = np.random.default_rng(seed), nodes * width
    owner = rng.integers(0, N, E)
    resident = at_owners(owner, N) | (rng.random((E, N)) < rng.random())
    topology = Topology(N, width, 1e9, 1e8)
    plan = deliver(resident, owner, topology, relay_at_home=relay)
    rounds = expert_traffic(resident, owner, topology, relay_at_home=relay)
    for moves, traffic in zip((plan.first, plan.second), rounds, strict=True):
        abroad = moves[:, 0] // width != moves[:, 1] // width
        for side, column in (("out", 0), ("in", 1)):
            for link, mask in (("intra", ~abroad), ("inter", abroad)):
                counted = np.bincount(moves[mask, column], minlength=N) / plan.parts
                expected = getattr(traffic, f"{link}_{side}")
                np.testing.assert_allclose(counted.sum(), expected.sum(), atol=1e-9)
                np.testing.assert_allclose(counted, expected, atol=E * width)
                if side == "out" and moves is plan.first:
                    np.testing.assert_allclose(counted, expected, atol=1e-9)


def test_check_finds_what_is_wrong() -> None:
    owner = np.array([0, 1])
    plan = deliver(np.ones((2, 2), dtype=bool), owner, Topology.flat(2), relay_at_home=False)
    object.__setattr__(plan, "first", plan.first[:1])
    with pytest.raises(ValueError, match="would not arrive"):
        plan.check()


def slowly(counts: np.ndarray, owner: np.ndarray, costs: ExpertCosts) -> set[int]:
    """FasterMoE's Algorithm 1, everything counted anew for each candidate."""
    N, E = counts.shape

    def seconds(shadows: set[int]) -> int:
        computed, received = [0] * N, [0] * N
        for source in range(N):
            for e in range(E):
                at = source if e in shadows else owner[e]
                computed[at] += int(counts[source, e])
                received[at] += int(counts[source, e]) * (at != source)
        return max(computed) * costs.pair + 4 * max(received) * costs.row + 2 * len(shadows) * costs.expert

    chosen: set[int] = set()
    for e in sorted(range(E), key=lambda e: (-int(counts[:, e].sum()), e)):
        if seconds(chosen | {e}) >= seconds(chosen):
            break
        chosen.add(e)
    return chosen


@settings(max_examples=200, deadline=None)
@given(st.integers(1, 4), st.integers(1, 8), st.integers(0, 10**6), st.integers(0, 50), st.integers(0, 400))
def test_shadows_follow_the_performance_model(N: int, E: int, seed: int, pair: int, expert: int) -> None:
    rng = np.random.default_rng(seed)
    counts, owner = rng.geometric(0.1, (N, E)) * rng.integers(0, 2, (N, E)), rng.integers(0, N, E)
    costs = ExpertCosts(pair, 7, expert)
    resident = shadowed(counts, owner, costs)
    expected = at_owners(owner, N)
    expected[sorted(slowly(counts, owner, costs))] = True
    np.testing.assert_array_equal(resident, expected)


def test_fetching_holds_what_was_chosen() -> None:
    counts = np.array([[1, 0, 0], [0, 0, 2]])
    np.testing.assert_array_equal(fetched(counts, np.array([1, 0, 1])), [[True, True], [True, False], [False, True]])
