"""The search for owners and the counts that feed it, against plain versions that count everything again each time."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from luffy.plan.mapping import _coactivation
from luffy.plan.rehoming import RehomingProblem, predicted_num_bytes
from luffy.plan.rehoming_search import Instance, search
from luffy.plan.replay import by_class
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep
from luffy.plan.traffic import sum_by_rank


class Plain:
    """The same search, a pair and a swap at a time."""

    def __init__(self, instance: Instance, max_load: int) -> None:
        self.i, self.max_load = instance, max_load
        self.E, self.N = instance.linear.shape

    def pair(self, e: int, f: int, rank: int) -> int:
        return int(self.i.pair(np.array(e), np.array(f), np.array(rank)))

    def total(self, owner: list[int]) -> int:
        cost = sum(int(self.i.linear[e, r]) for e, r in enumerate(owner))
        same = [(e, f) for e in range(self.E) for f in range(e) if owner[e] == owner[f]]
        return cost - sum(self.pair(e, f, owner[e]) for e, f in same)

    def loads(self, owner: list[int]) -> list[int]:
        return [sum(int(self.i.tokens[e]) for e in range(self.E) if owner[e] == r) for r in range(self.N)]

    def cluster(self) -> list[int] | None:
        owner = [-1] * self.E
        mean = [int(self.i.linear[e].sum()) // self.N for e in range(self.E)]
        for _ in range(self.E):
            best: tuple[int, int, int] | None = None
            loads = self.loads(owner)
            for e in (e for e in range(self.E) if owner[e] < 0):
                for r in range(self.N):
                    held = [f for f in range(self.E) if owner[f] == r]
                    if len(held) == self.E // self.N or loads[r] + self.i.tokens[e] > self.max_load:
                        continue
                    gain = mean[e] - int(self.i.linear[e, r]) + sum(self.pair(e, f, r) for f in held)
                    if best is None or gain > best[0]:
                        best = gain, e, r
            if best is None:
                return None
            owner[best[1]] = best[2]
        return owner

    def swap(self, owner: list[int]) -> list[int]:
        owner = list(owner)
        while True:
            now, found = self.total(owner), []
            for e in range(self.E):
                for f in range(self.E):
                    if owner[e] >= owner[f]:
                        continue
                    other = list(owner)
                    other[e], other[f] = owner[f], owner[e]
                    loads = self.loads(other)
                    gain = now - self.total(other)
                    if gain > 0 and max(loads[owner[e]], loads[owner[f]]) <= self.max_load:
                        found.append((-gain, e, f))
            if not found:
                return owner
            touched: set[int] = set()
            for _, e, f in sorted(found):
                a, b = owner[e], owner[f]
                if not {a, b} & touched:
                    owner[e], owner[f] = b, a
                    touched |= {a, b}

    def match(self, owner: list[int]) -> list[int]:
        cost = np.zeros((self.N, self.N), dtype=np.int64)
        for cluster in range(self.N):
            held = [e for e in range(self.E) if owner[e] == cluster]
            for r in range(self.N):
                cost[cluster, r] = sum(int(self.i.linear[e, r]) for e in held)
                cost[cluster, r] -= sum(self.pair(e, f, r) for e in held for f in held if f < e)
        rank = linear_sum_assignment(cost)[1]
        return [int(rank[r]) for r in owner]


def instance_of(seed: int) -> tuple[Instance, np.ndarray]:
    rng = np.random.default_rng(seed)
    N, each, G = int(rng.choice([1, 2, 4])), int(rng.integers(1, 4)), int(rng.integers(1, 9))
    links = Topology(N, int(rng.choice([d for d in (1, 2, 4) if N % d == 0])), 1e10, 10.0 ** rng.integers(8, 11))
    most = int(rng.choice([2, 4, 1000]))  # few: many ties
    together = rng.integers(0, most, (N * each, N * each))
    owner = rng.permutation(np.repeat(np.arange(N), each))
    problem = RehomingProblem(
        rng.integers(0, most, (G, N * each)), together + together.T, owner, links, 1, 0, rng.integers(0, N, G)
    )
    return Instance.of(problem.rows_by_class, problem.coactivation, links, [None, 0.0, 0.1][seed % 3]), owner


@pytest.mark.parametrize("seed", range(60))
def test_the_search_finds_what_the_plain_one_finds(seed: int) -> None:
    instance, owner = instance_of(seed)
    plain = Plain(instance, instance.max_load(owner))
    starts = [s for s in (owner.tolist(), plain.cluster()) if s is not None]
    expected = [plain.swap(plain.match(plain.swap(start))) for start in starts]
    assert [found.tolist() for found in search(instance, owner)] == expected


@given(st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_rows_by_class_and_the_bytes_of_a_mapping_by_their_definitions(seed: int) -> None:
    rng = np.random.default_rng(seed)
    N, each, G = int(rng.choice([2, 4, 8])), int(rng.integers(1, 4)), int(rng.integers(1, 9))
    E, links = N * each, Topology(N, int(rng.choice([1, 2])), 1e10, 1e9)
    affinity, homes, together = rng.integers(0, 9, (G, E)), rng.integers(0, N, G), rng.integers(0, 9, (E, E))
    owner = rng.permutation(np.repeat(np.arange(N), each))
    problem = RehomingProblem(affinity, together + together.T, owner, links, 3, 0, homes, passes=2)
    classes = links.link_class_matrix()[homes]
    for c in range(3):
        assert (problem.rows_by_class[c] == affinity.T @ (classes == c)).all()
    rows = problem.rows_by_class[:, np.arange(E), owner]
    expected = rows.sum(1)
    for e in range(E):
        for f in range(e + 1, E):
            if owner[e] == owner[f]:
                both = rows[:, e] + rows[:, f]
                expected = expected - problem.coactivation[e, f] * both // max(1, both.sum())
    assert predicted_num_bytes(problem, owner) == tuple(6 * expected)


def membership(ids: np.ndarray, size: int) -> np.ndarray:
    """ids [T, K] in -1..size-1 -> bool [T, size]: which of them occur. -1 is passed over."""
    out = np.zeros((len(ids), size + 1), dtype=bool)
    out[np.arange(len(ids))[:, None], ids] = True  # -1 lands in the last column
    return out[:, :size]


@given(st.integers(0, 10**6), st.integers(1, 4))
@settings(max_examples=40, deadline=None)
def test_counts_equal_those_over_memberships(seed: int, K: int) -> None:
    """Ids may repeat in a token and be -1; sequences may be empty."""
    rng = np.random.default_rng(seed)
    E, lengths = 6, rng.integers(0, 5, 7)
    ids = rng.integers(-1, E, (1, int(lengths.sum()), K)).astype(np.int16)
    step = TraceStep(1, lengths, np.zeros(7, dtype=np.int64), ids, ids[:0])
    chosen, of = membership(ids[0], E).astype(np.int64), np.repeat(np.arange(7), lengths)
    assert (step.counts_by_expert(0, E) == np.stack([chosen[of == s].sum(0) for s in range(7)])).all()
    every = np.stack([np.bincount(ids[0][of == s][ids[0][of == s] >= 0], minlength=E) for s in range(7)])
    assert (step.count_by_sequence(ids[0], E, once=False) == every).all()
    both = chosen.T @ chosen
    np.fill_diagonal(both, 0)
    assert (_coactivation(step, 0, E) == both).all()


def test_sums_by_rank_and_by_class_of_link() -> None:
    rng = np.random.default_rng(0)
    links, homes = Topology(6, 2, 1e9, 1e8), rng.integers(0, 6, 20)
    rows = rng.integers(0, 9, (20, 6))
    expected = np.zeros((6, 6), dtype=np.int64)
    np.add.at(expected, homes, rows)
    got = sum_by_rank(rows, homes, 6)
    assert got.dtype == np.int64 and (got == expected).all()
    classes = links.link_class_matrix()
    assert by_class(rows, homes, links).tolist() == [int(rows[classes[homes] == c].sum()) for c in range(3)]
