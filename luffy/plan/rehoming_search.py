"""The search behind rehoming.py: cluster greedily, match clusters to ranks exactly, swap experts while it helps.

The cost of a mapping is a sum over ranks of what each rank's experts cost there, so two swaps between four different
ranks do not see each other: every round evaluates all E x E swaps as one matrix and makes the best of them on disjoint
ranks. Everything is int64; ties go to the lower index.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

from luffy.plan.topology import Topology

_MAX_ROUNDS = 200


@dataclass(frozen=True, eq=False)
class Instance:
    """linear [E, N]: wire time of all rows of e if r owns it; pair(e, f, r): what is saved when r owns both.

    tokens [E]: load of each expert; max_load: the most tokens a rank may be asked for.
    """

    linear: np.ndarray
    coactivation: np.ndarray
    tokens: np.ndarray
    max_load_slack: float | None

    @classmethod
    def of(
        cls, rows_by_class: np.ndarray, coactivation: np.ndarray, topology: Topology, load_slack: float | None
    ) -> "Instance":
        """Weigh rows [3, E, N] by link class, in few enough bits that a product with a count fits int64."""
        _, intra, inter = topology.class_weights
        scale = max(intra, inter) / (1 << 10)
        intra, inter = (max(1, round(weight / scale)) for weight in (intra, inter))
        linear = rows_by_class[1] * intra + rows_by_class[2] * inter
        coactivation = coactivation.copy()
        np.fill_diagonal(coactivation, 0)
        excess = int(linear.max()).bit_length() + int(coactivation.max()).bit_length() + 1 - 62
        linear >>= max(0, excess)  # never at counts a training step can produce
        return cls(linear, coactivation, rows_by_class[:, :, 0].sum(axis=0), load_slack)

    def pair(self, e: np.ndarray, f: np.ndarray, rank: np.ndarray) -> np.ndarray:
        """Wire time saved by e and f sharing `rank`; arguments broadcast."""
        both = np.maximum(1, self.tokens[e] + self.tokens[f])
        return self.coactivation[e, f] * (self.linear[e, rank] + self.linear[f, rank]) // both

    def cost_at(self, owner: np.ndarray) -> np.ndarray:
        """int64 [E, N]: cost of expert e at rank r beside the experts that r owns now (other than e)."""
        E, N = self.linear.shape
        cost = self.linear.copy()
        members = np.argsort(owner, kind="stable").reshape(N, E // N)
        for slot in range(E // N):
            cost -= self.pair(np.arange(E)[:, None], members[None, :, slot], np.arange(N)[None, :])
        return cost

    def max_load(self, owner: np.ndarray) -> int:
        loads = np.zeros(self.linear.shape[1], dtype=np.int64)
        np.add.at(loads, owner, self.tokens)
        busiest = int(loads.max())
        if self.max_load_slack is None:
            return int(self.tokens.sum())
        return busiest + int(busiest * self.max_load_slack)


def search(instance: Instance, owner: np.ndarray) -> Iterator[np.ndarray]:
    """Mappings worth pricing, all even and within the load limit: the present one improved, and one from scratch."""
    max_load = instance.max_load(owner)
    starts = [owner, _cluster(instance, max_load)]
    for start in starts:
        if start is not None:
            yield _swap(instance, _match(instance, _swap(instance, start, max_load)), max_load)


def _match(instance: Instance, owner: np.ndarray) -> np.ndarray:
    """Hand whole clusters to the ranks where they cost least: an exact N x N assignment."""
    E, N = instance.linear.shape
    members = np.argsort(owner, kind="stable").reshape(N, E // N)
    cost = np.zeros((N, N), dtype=np.int64)  # [cluster, rank]
    for i in range(E // N):
        cost += instance.linear[members[:, i]]
        for j in range(i):
            cost -= instance.pair(members[:, i, None], members[:, j, None], np.arange(N)[None, :])
    rank_of_cluster = linear_sum_assignment(cost)[1]
    return rank_of_cluster[owner]


def _cluster(instance: Instance, max_load: int) -> np.ndarray | None:
    """Place experts one by one, always the one that gains most over the average rank; None if loads do not fit."""
    E, N = instance.linear.shape
    owner = np.full(E, -1, dtype=np.int64)
    room, loads = np.full(N, E // N), np.zeros(N, dtype=np.int64)
    gain = instance.linear.sum(axis=1, keepdims=True) // N - instance.linear
    never = np.iinfo(np.int64).min
    for _ in range(E):
        allowed = (room > 0) & (loads + instance.tokens[:, None] <= max_load) & (owner < 0)[:, None]
        masked = np.where(allowed, gain, never)
        e, r = divmod(int(masked.argmax()), N)
        if not allowed[e, r]:
            return None
        owner[e] = r
        room[r] -= 1
        loads[r] += instance.tokens[e]
        gain[:, r] += instance.pair(np.arange(E), np.array(e), np.array(r))
    return owner


class _Swaps(NamedTuple):
    gain: np.ndarray
    first: np.ndarray
    second: np.ndarray


def _improving_swaps(instance: Instance, owner: np.ndarray, max_load: int) -> _Swaps:
    """All swaps of two experts that gain and keep loads in bounds, best first."""
    E = owner.size
    experts = np.arange(E)
    cost = instance.cost_at(owner)
    own = cost[experts, owner]
    elsewhere = cost[:, owner]  # [e, f]: e at the rank of f, beside f; the pair's saving is lost, as f leaves
    lost = instance.pair(experts[:, None], experts[None, :], owner[None, :])
    gain = own[:, None] + own[None, :] - elsewhere - elsewhere.T - lost - lost.T
    loads = np.zeros(cost.shape[1], dtype=np.int64)
    np.add.at(loads, owner, instance.tokens)
    after = loads[owner][:, None] - instance.tokens[:, None] + instance.tokens[None, :]  # of e's rank
    fits = (np.maximum(after, after.T) <= max_load) & (owner[:, None] < owner[None, :])
    first, second = np.nonzero(fits & (gain > 0))
    best_first = np.argsort(-gain[first, second], kind="stable")
    first, second = first[best_first], second[best_first]
    return _Swaps(gain[first, second], first, second)


def _swap(instance: Instance, owner: np.ndarray, max_load: int) -> np.ndarray:
    """Make improving swaps, the best on disjoint ranks each round, until none is left."""
    owner = owner.copy()
    for _ in range(_MAX_ROUNDS):
        swaps = _improving_swaps(instance, owner, max_load)
        if not swaps.gain.size:
            break
        touched: set[int] = set()
        for e, f in zip(swaps.first.tolist(), swaps.second.tolist(), strict=True):
            a, b = int(owner[e]), int(owner[f])
            if a not in touched and b not in touched:
                owner[e], owner[f] = b, a
                touched |= {a, b}
                if len(touched) > instance.linear.shape[1] - 2:
                    break
    return owner
