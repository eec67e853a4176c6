"""Algorithm 1 of Luffy (arXiv 2411.15419), as published: greedy, one sequence after another.

    for each sequence i:
        f[i, j] <- traffic of pulling i's expert outputs to rank j, for every rank j
        candidates <- the q ranks of least f[i, j]
        give i to the candidate whose attention cost grows least, T_att(B + 1, max(L, length_i)) - T_att(B, L),
        among those with capacity left

Line 6 of the printed algorithm takes the candidate of *maximum* growth. The surrounding text ("minimises") and
sense say minimum, and minimum is what is done here. The paper's T_att assumes padded batches; in a packed batch
every candidate grows by the same amount and the tie goes to the least traffic, so the algorithm becomes greedy by
traffic.

What the paper leaves open is filled in the plainest way: when no candidate has room, the least-traffic rank that has;
capacity is the balance that all strategies are held to. The order of the sequences matters and no choice is ever
revised, which is what `best` improves on.
"""

from collections.abc import Iterable

import numpy as np

from luffy.errors import UserError
from luffy.plan.balance import budgets
from luffy.plan.cost import SCORE_COST_ONE, AttentionCost
from luffy.plan.problem import PlacementProblem
from luffy.plan.result import PlacementPlan, make_plan
from luffy.plan.traffic import benefit_matrix


def luffy_paper(problem: PlacementProblem, *, num_candidates: int = 4) -> PlacementPlan:
    """Algorithm 1 with q = num_candidates.

    Balance always holds. Under token budgets a greedy order can paint itself into a corner where some sequence fits
    nowhere; then all are placed again, longest first, and if that fails too the plan is to stay. Does not promise to
    cost less than staying: attention growth may overrule traffic. Raises UserError when num_candidates < 1.
    """
    if num_candidates < 1:
        raise UserError(f"placement luffy_paper: num_candidates={num_candidates} must be at least 1")
    values = benefit_matrix(problem).values
    # Stable, so that ranks of equal traffic keep their order on every processor.
    by_traffic = np.argsort(-values, axis=1, kind="stable").tolist()
    in_order = range(problem.num_sequences)
    new_home = _greedy(problem, by_traffic, num_candidates, in_order)
    if new_home is None:
        longest_first = np.argsort(-problem.lengths, kind="stable").tolist()
        new_home = _greedy(problem, by_traffic, num_candidates, longest_first)
    return make_plan(problem, "luffy_paper", problem.home_rank if new_home is None else new_home)


class _Batch:
    """The sequences a rank has been given so far. Plain Python integers: this loop is scalar by nature."""

    def __init__(self, attention: AttentionCost, padded: bool) -> None:
        self.hidden_size, self.score_cost, self.padded = attention.hidden_size, attention.score_cost, padded
        self.sequences = self.tokens = self.longest = self.flops = 0

    def flops_with(self, length: int) -> int:
        """Attention operations after adding one more sequence: AttentionCost, inlined for speed."""
        d = self.hidden_size
        longest = max(self.longest, length) if self.padded else length
        one = longest * (3 * d * d + 2 * d * longest * self.score_cost // SCORE_COST_ONE)
        return (self.sequences + 1) * one if self.padded else self.flops + one

    def add(self, length: int) -> None:
        self.flops = self.flops_with(length)
        self.longest = max(self.longest, length)
        self.sequences += 1
        self.tokens += length


def _greedy(problem: PlacementProblem, by_traffic: list[list[int]], q: int, order: Iterable[int]) -> np.ndarray | None:
    """int64 [S], or None when some sequence finds no rank with room."""
    batches = [_Batch(problem.attention, problem.layout == "padded") for _ in range(problem.num_ranks)]
    lengths = problem.lengths.tolist()
    quotas = problem.quotas.tolist()
    limit = budgets(problem)
    by_count = problem.balance.mode == "sequences"

    def has_room(rank: int, length: int) -> bool:
        batch = batches[rank]
        if by_count:
            return batch.sequences < quotas[rank]
        return batch.tokens + length <= limit.tokens and batch.flops_with(length) <= limit.attention_flops

    new_home = problem.home_rank.copy()
    for i in order:
        length, ranks = lengths[i], by_traffic[i]
        candidates = [rank for rank in ranks[:q] if has_room(rank, length)]
        if candidates:
            chosen = min(candidates, key=lambda rank: batches[rank].flops_with(length) - batches[rank].flops)
        else:
            chosen = next((rank for rank in ranks[q:] if has_room(rank, length)), -1)
            if chosen < 0:
                return None
        batches[chosen].add(length)
        new_home[i] = chosen
    return new_home
