"""The local stages against loops that say the same thing slowly: copies, pairs by expert."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from luffy.exchange.copies import copy_keys, in_order
from luffy.exchange.permute import pairs_by_expert

from .routes import expert_map, random_routing

Routing = tuple[np.ndarray, int, int, int | None]


@st.composite
def routings(draw: Callable) -> Routing:
    """Ids [T, K] with -1 among them, number of experts, EP size, seed of the experts' places."""
    ep_size = draw(st.sampled_from([1, 2, 4]))
    num_experts = ep_size * draw(st.integers(1, 3))
    top_k = draw(st.integers(1, num_experts))
    drop = draw(st.sampled_from([0.0, 0.3, 1.0]))
    ids = random_routing(0, draw(st.integers(0, 7)), num_experts, top_k, draw(st.integers(0, 999)), drop)
    return ids, num_experts, ep_size, draw(st.none() | st.integers(0, 99))


@given(routings(), st.integers(0, 3), st.sampled_from(["pairs", "ranks"]))
def test_copies_are_those_of_a_loop(routing: Routing, me: int, per: str) -> None:
    """One copy a served choice, or one a (token, rank); own copies first, then by rank, then by token."""
    ids, num_experts, ep_size, seed = routing
    me %= ep_size
    experts = expert_map(num_experts, ep_size, seed)
    keys = copy_keys(torch.from_numpy(ids), experts, me, per)
    slots = experts.slot_of_expert.tolist()
    expected = []
    for token, choices in enumerate(ids.tolist()):
        visited = set()
        for k, expert in enumerate(choices):
            rank = -1 if expert < 0 else slots[expert] // experts.num_local_experts
            assert keys.rank[token, k] == rank
            copy = rank >= 0 and (per == "pairs" or rank not in visited)
            assert keys.is_copy[token, k] == copy
            visited.add(rank)
            if copy:
                expected.append((rank != me, rank, token, k))
    order = in_order(keys, me, ep_size, len(expected)).flat
    assert order.tolist() == [token * ids.shape[1] + k for _, _, token, k in sorted(expected)]


@given(routings(), st.integers(0, 3))
def test_pairs_are_those_of_a_loop(routing: Routing, me: int) -> None:
    """For each expert of this rank in turn, the rows that chose it, in order."""
    ids, num_experts, ep_size, seed = routing
    me %= ep_size
    experts = expert_map(num_experts, ep_size, seed)
    slots = experts.slot_of_expert.tolist()
    expected, counts = [], []
    for place in range(me * experts.num_local_experts, (me + 1) * experts.num_local_experts):
        rows = [(t, k) for (t, k), e in np.ndenumerate(ids) if e >= 0 and slots[e] == place]
        expected += rows
        counts.append(len(rows))
    pairs = pairs_by_expert(torch.from_numpy(ids), experts, me, len(expected))
    assert pairs.row.tolist() == [row for row, _ in expected]
    assert pairs.flat.tolist() == [row * ids.shape[1] + k for row, k in expected]
    assert pairs.sizes == counts
