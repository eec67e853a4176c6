"""The search behind rehoming.py: cluster greedily, match clusters to ranks exactly, swap experts while it helps.

The cost of a mapping is a sum over ranks of what each rank's experts cost there, so two swaps between four different
ranks do not see each other: every round takes the best of all E x E swaps on disjoint ranks, and counts again only what
those ranks bear on. Everything is int64; ties go to the lower index.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from scipy.optimize import linear_sum_assignment

from luffy.plan.balance import budget
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

    def max_load(self, owner: np.ndarray) -> int:
        if self.max_load_slack is None:
            return int(self.tokens.sum())
        loads = np.zeros(self.linear.shape[1], dtype=np.int64)
        np.add.at(loads, owner, self.tokens)
        return budget(loads, int(self.tokens.sum()), self.max_load_slack)


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
    """Place experts one by one, always the one that gains most over the average rank; None if loads do not fit.

    Placing one changes one column of the table of gains, so the best rank of each expert is kept beside it and only
    looked for again where that rank closed.
    """
    E, N = instance.linear.shape
    experts, never = np.arange(E), np.iinfo(np.int64).min
    owner = np.full(E, -1, dtype=np.int64)
    room, loads = np.full(N, E // N), np.zeros(N, dtype=np.int64)
    gain = instance.linear.sum(axis=1, keepdims=True) // N - instance.linear
    gain[instance.tokens > max_load] = never
    favourite = gain.argmax(axis=1)  # the first of equals, here and below
    most = gain[experts, favourite]
    for _ in range(E):
        e = int(most.argmax())
        if most[e] == never:
            return None
        r = int(favourite[e])
        owner[e], most[e] = r, never
        room[r] -= 1
        loads[r] += instance.tokens[e]
        waits, fits = owner < 0, np.zeros(E, dtype=bool)
        if room[r]:  # what does not fit now never will: loads only grow
            fits = (gain[:, r] != never) & (loads[r] + instance.tokens <= max_load)
            gain[:, r] = np.where(fits, gain[:, r] + instance.pair(experts, np.array(e), np.array(r)), never)
        else:
            gain[:, r] = never
        closed = np.flatnonzero(waits & (favourite == r) & ~fits)
        if closed.size:
            favourite[closed] = gain[closed].argmax(axis=1)
            most[closed] = gain[closed, favourite[closed]]
        if room[r]:
            column = gain[:, r]
            better = waits & fits & ((column > most) | ((column == most) & (r < favourite)) | (favourite == r))
            favourite[better], most[better] = r, column[better]
    return owner


class _Swaps:
    """What every swap of two experts gains, kept up as experts trade places.

    replaced [E, E]: cost of e at the rank of f in the place of f. own [E]: of e where it is. A swap changes both ranks'
    members, hence the columns of `replaced`, and the entries of `own`, of the experts there; nothing else.
    """

    def __init__(self, instance: Instance, owner: np.ndarray, max_load: int) -> None:
        E, N = instance.linear.shape
        self.instance, self.max_load, self.owner = instance, max_load, owner.copy()
        self.loads = np.zeros(N, dtype=np.int64)
        np.add.at(self.loads, owner, instance.tokens)
        self.replaced, self.own = np.empty((E, E), dtype=np.int64), np.empty(E, dtype=np.int64)
        self.gain = np.empty((E, E), dtype=np.int64)  # 0 where loads would not fit, or the other half of the table says
        self._refresh(np.arange(N))

    def _refresh(self, ranks: np.ndarray) -> None:
        """Count again what the members of these ranks bear on."""
        instance, owner = self.instance, self.owner
        E, N = instance.linear.shape
        everyone = np.arange(E)
        members = np.argsort(owner, kind="stable").reshape(N, E // N)[ranks]  # [R, E / N]
        if E == N:  # nobody is beside anybody
            mine = members[:, 0]
            self.replaced[:, mine] = instance.linear[:, ranks]
            self.own[mine] = instance.linear[mine, ranks]
        else:
            # saved[e, i, j]: by e beside the j-th member of the i-th rank. A pair of e with itself saves nothing: the
            # diagonal of coactivation is 0.
            saved = np.stack([instance.pair(everyone[:, None], m[None], ranks[None]) for m in members.T], axis=2)
            beside = saved.sum(axis=2)
            for j, mine in enumerate(members.T):
                self.replaced[:, mine] = instance.linear[:, ranks] - (beside - saved[:, :, j])
                self.own[mine] = instance.linear[mine, ranks] - beside[mine, np.arange(len(ranks))]
        changed = everyone if len(ranks) == N else members.ravel()
        part = self._gains(changed)
        self.gain[changed] = np.where(owner[changed, None] < owner[None], part, 0)
        if len(ranks) < N:
            self.gain[:, changed] = np.where(owner[:, None] < owner[None, changed], part.T, 0)

    def _gains(self, rows: np.ndarray) -> np.ndarray:
        """int64 [R, E]: what a swap of each of these experts with each other gains; 0 where loads would not fit."""
        tokens, loads = self.instance.tokens, self.loads[self.owner]
        gain = self.own[rows, None] + self.own[None] - self.replaced[rows] - self.replaced[:, rows].T
        moved = tokens[None] - tokens[rows, None]  # onto the rank of the row
        fits = np.maximum(loads[rows, None] + moved, loads[None] - moved) <= self.max_load
        return np.where(fits, gain, 0)

    def improving(self) -> tuple[list[int], list[int]]:
        """Pairs of experts whose swap gains and keeps loads in bounds, the best first, the first of equals first."""
        first, second = np.nonzero(self.gain > 0)
        order = np.argsort(-self.gain[first, second], kind="stable")
        return first[order].tolist(), second[order].tolist()

    def make_the_best(self) -> bool:
        """Make the best swaps on disjoint ranks; whether there was any."""
        first, second = self.improving()
        touched: set[int] = set()
        for e, f in zip(first, second, strict=True):
            a, b = int(self.owner[e]), int(self.owner[f])
            if a not in touched and b not in touched:
                self.owner[e], self.owner[f] = b, a
                more = self.instance.tokens[f] - self.instance.tokens[e]
                self.loads[a] += more
                self.loads[b] -= more
                touched |= {a, b}
                if len(touched) > self.instance.linear.shape[1] - 2:
                    break
        if touched:
            self._refresh(np.array(sorted(touched)))
        return bool(touched)


def _swap(instance: Instance, owner: np.ndarray, max_load: int) -> np.ndarray:
    """Make improving swaps, the best on disjoint ranks each round, until none is left."""
    swaps = _Swaps(instance, owner, max_load)
    for _ in range(_MAX_ROUNDS):
        if not swaps.make_the_best():
            break
    return swaps.owner
