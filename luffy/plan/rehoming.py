"""Expert re-homing: which rank should own which expert, decided rarely and kept for many steps.

Sequence migration shortens combine, but says nothing about the next layer's dispatch: measured, 0.94 of its rows
cross ranks before and after. Two things do shorten it, and both are a matter of where experts live:

* experts that tokens use *together* on one rank: after per-rank deduplication a token with both crosses once;
* experts on the rank (or node) whose sequences want them: such a token does not cross at all.

Per step and pass, with group g living on rank h(g), the rows on the wire are predicted as

    sum over g, e of affinity[g, e] on the link h(g) -> owner(e)
      - sum over pairs e < f on one rank r of coactivation[e, f], spread over links as the tokens of e and f are.

This is exact for top-2 routing but for that spread (who wants both is estimated from who wants either). For larger
top-k a token with three experts on one rank is credited with three saved rows instead of two: predictions are then
optimistic.

Moving experts costs their weights and optimizer state once; a plan says whether that pays before the next re-homing.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from luffy.plan.problem import as_int64, require
from luffy.plan.rehoming_search import Instance, search
from luffy.plan.result import PlanError
from luffy.plan.topology import Topology
from luffy.plan.traffic import sum_by_rank


@dataclass(frozen=True, eq=False)
class RehomingProblem:
    """E experts on N ranks, E / N on each; G groups of sequences (or one group per rank).

    affinity [G, E]: tokens a step that group g routes to expert e. coactivation [E, E]: tokens a step that use both
    e and f (symmetric; the diagonal is ignored). owner [E]: the rank of each expert now. group_rank [G]: where each
    group lives (None: group g on rank g). row_num_bytes: one row on the wire; passes: how often a step moves each
    row (4: dispatch, combine, and both backward). expert_num_bytes: weights plus optimizer state of one expert.
    load_slack: no rank may be asked for more than (1 + load_slack) times the mean in tokens, or what the busiest rank
    has now where that is more (slack on top of that would be granted anew every time); None: no limit.

    Raises ValueError when shapes disagree, the present mapping is not even, or a number is out of range.
    """

    affinity: np.ndarray
    coactivation: np.ndarray
    owner: np.ndarray
    topology: Topology
    row_num_bytes: int
    expert_num_bytes: int
    group_rank: np.ndarray | None = None
    steps_until_next: int = 500
    passes: int = 4
    load_slack: float | None = 0.2

    def __post_init__(self) -> None:
        for name in ("affinity", "coactivation", "owner", "group_rank"):
            if getattr(self, name) is not None:
                object.__setattr__(self, name, as_int64(name, getattr(self, name)))
        N, E = self.topology.world_size, self.owner.size
        if self.group_rank is None:
            object.__setattr__(self, "group_rank", np.arange(N))
        G = self.homes.size
        require(E > 0 and E % N == 0, f"{E} experts do not divide over {N} ranks")
        require(self.affinity.shape == (G, E), f"affinity is {self.affinity.shape}, not [{G} groups, {E} experts]")
        require(self.coactivation.shape == (E, E), f"coactivation is {self.coactivation.shape}, not [{E}, {E}]")
        require(bool((self.coactivation == self.coactivation.T).all()), "coactivation must be symmetric")
        require(self.affinity.min(initial=0) >= 0 and self.coactivation.min() >= 0, "counts must be >= 0")
        _require_even(self.owner, N, "owner")
        require(G == 0 or 0 <= self.homes.min() <= self.homes.max() < N, f"group_rank must lie in 0..{N - 1}")
        largest = int(self.affinity.max(initial=0)) * G
        require(largest < 1 << 40 and int(self.coactivation.max()) < 1 << 40, "counts a step must stay below 2**40")
        require(min(self.row_num_bytes, self.passes) > 0, "row_num_bytes and passes must be positive")
        require(min(self.expert_num_bytes, self.steps_until_next) >= 0, "bytes and steps must be >= 0")

    @property
    def homes(self) -> np.ndarray:
        """group_rank with its default filled in."""
        assert self.group_rank is not None
        return self.group_rank

    @cached_property
    def rows_by_class(self) -> np.ndarray:
        """int64 [3, E, N]: rows of expert e that would cross each link class if rank r owned it."""
        N, width = self.topology.world_size, self.topology.ranks_per_node
        at_rank = sum_by_rank(self.affinity, self.homes, N)
        on_node = np.repeat(at_rank.reshape(-1, width, self.owner.size).sum(1), width, axis=0)
        return np.stack([at_rank.T, (on_node - at_rank).T, (at_rank.sum(0) - on_node).T])


@dataclass(frozen=True, eq=False)
class RehomingPlan:
    """new_owner [E]: the rank of each expert; slot_to_expert [E]: experts in rank order, E / N slots a rank.

    num_bytes and present_num_bytes: predicted bytes a step per link class (local, intra-node, inter-node), after
    and now. move_num_bytes: per link class, once. pays: the wire time saved until the next re-homing exceeds that
    of moving.
    """

    new_owner: np.ndarray
    slot_to_expert: np.ndarray
    num_bytes: tuple[int, int, int]
    present_num_bytes: tuple[int, int, int]
    move_num_bytes: tuple[int, int, int]
    num_moved: int
    pays: bool

    def check(self, problem: RehomingProblem) -> None:
        """Raise PlanError, saying what is wrong, unless this mapping may be executed for `problem`."""
        E, N = problem.owner.size, problem.topology.world_size
        if self.new_owner.shape != (E,) or self.new_owner.dtype != np.int64:
            raise PlanError(f"re-homing: new_owner is {self.new_owner.dtype} {self.new_owner.shape}, not int64 ({E},)")
        try:
            _require_even(self.new_owner, N, "new_owner")
        except ValueError as error:
            raise PlanError(f"re-homing: {error}") from None
        if not np.array_equal(np.sort(self.slot_to_expert), np.arange(E)):
            raise PlanError("re-homing: slot_to_expert does not name every expert once")
        if not np.array_equal(self.new_owner[self.slot_to_expert], np.arange(E) // (E // N)):
            raise PlanError("re-homing: slot_to_expert and new_owner disagree")
        weigh = problem.topology.weighted_bytes
        predicted, present = (predicted_num_bytes(problem, owner) for owner in (self.new_owner, problem.owner))
        if predicted != self.num_bytes:
            raise PlanError(f"re-homing: predicted bytes {self.num_bytes} are not those of its mapping, {predicted}")
        if weigh(predicted) > weigh(present):
            raise PlanError(f"re-homing: {predicted} bytes a step per link class, worse than {present} now")


def predicted_num_bytes(problem: RehomingProblem, owner: np.ndarray) -> tuple[int, int, int]:
    """Bytes a step per link class if owner[e] owned expert e: the formula of the module docstring."""
    E, N = owner.size, problem.topology.world_size
    rows = problem.rows_by_class[:, np.arange(E), owner]  # [3, E]: each expert's rows by class
    members = np.argsort(owner, kind="stable").reshape(N, E // N)
    first, second = np.triu_indices(E // N, k=1)
    e, f = members[:, first].ravel(), members[:, second].ravel()
    both = np.maximum(1, rows[:, e].sum(axis=0) + rows[:, f].sum(axis=0))
    # Products of two counts: Python integers where 64 bits might not do.
    shared = problem.coactivation[e, f].astype(object) * (rows[:, e] + rows[:, f]) // both
    crossing = rows.sum(axis=1) - (shared.sum(axis=1) if e.size else 0)
    local, intra, inter = (int(count) * problem.row_num_bytes * problem.passes for count in crossing)
    return local, intra, inter


def plan_rehoming(problem: RehomingProblem) -> RehomingPlan:
    """Choose owners: greedy clustering and swap search, from the present mapping and from scratch; keep the better.

    Deterministic and in integers. Never predicted to cost more wire time than the present mapping, which wins ties.
    """
    topology = problem.topology
    present = predicted_num_bytes(problem, problem.owner)
    best_owner, best_bytes = problem.owner, present
    instance = Instance.of(problem.rows_by_class, problem.coactivation, topology, problem.load_slack)
    for owner in search(instance, problem.owner):
        predicted = predicted_num_bytes(problem, owner)
        if topology.weighted_bytes(predicted) < topology.weighted_bytes(best_bytes):
            best_owner, best_bytes = owner, predicted

    classes = topology.link_class_matrix()[problem.owner, best_owner]
    moves = np.bincount(classes, minlength=3)
    local, intra, inter = (int(count) * problem.expert_num_bytes if c else 0 for c, count in enumerate(moves))
    saved = topology.weighted_bytes(present) - topology.weighted_bytes(best_bytes)
    pays = saved * problem.steps_until_next > topology.weighted_bytes((local, intra, inter))
    return RehomingPlan(
        new_owner=best_owner,
        slot_to_expert=np.argsort(best_owner, kind="stable"),
        num_bytes=best_bytes,
        present_num_bytes=present,
        move_num_bytes=(local, intra, inter),
        num_moved=int(np.count_nonzero(best_owner != problem.owner)),
        pays=bool(pays),
    )


def _require_even(owner: np.ndarray, num_ranks: int, name: str) -> None:
    require(0 <= owner.min() <= owner.max() < num_ranks, f"{name} must lie in 0..{num_ranks - 1}")
    counts = np.bincount(owner, minlength=num_ranks)
    uneven = np.flatnonzero(counts != owner.size // num_ranks)
    if uneven.size:
        raise ValueError(f"{name}: rank {uneven[0]} owns {counts[uneven[0]]} experts, not {owner.size // num_ranks}")
