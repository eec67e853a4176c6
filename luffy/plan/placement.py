"""Placement strategies by name: where each sequence is rebuilt after the experts have run.

    plan = plan_placement("best", problem)
    plan.check(problem)

A strategy is a pure function from a `PlacementProblem` to a `PlacementPlan`: no communication, no clock, no
randomness that is not an argument. Every rank calls it on the same all-gathered counts and gets the same plan;
`plan.digest()` is what ranks compare to be sure. Strategies register here, and nowhere else:

* `stay`: nobody moves; the baseline, and always feasible.
* `luffy_paper`: Algorithm 1 of the Luffy paper (luffy_paper.py).
* `netmoe`, `exact`: exact assignments under equal counts (exact.py).
* `best`: near-optimal in about a millisecond, equal counts or token budgets (best.py).
* `random`: a random balanced plan, for tests and as a sanity check of measurements.
"""

import inspect
from collections.abc import Callable
from typing import Any

import numpy as np

from luffy.errors import UserError
from luffy.plan.balance import Budgets, RankLoads, budgets, rank_loads
from luffy.plan.best import best
from luffy.plan.exact import exact, netmoe
from luffy.plan.luffy_paper import luffy_paper
from luffy.plan.problem import Balance, PlacementProblem
from luffy.plan.result import PlacementPlan, PlanError, make_plan
from luffy.plan.traffic import bottleneck_femtoseconds, num_bytes_per_class, rank_traffic, weighted_bytes

__all__ = [
    "STRATEGIES",
    "WEIGHS_ATTENTION",
    "Balance",
    "Budgets",
    "PlacementPlan",
    "PlacementProblem",
    "PlanError",
    "RankLoads",
    "best",
    "bottleneck_femtoseconds",
    "budgets",
    "exact",
    "luffy_paper",
    "netmoe",
    "num_bytes_per_class",
    "plan_placement",
    "random_plan",
    "rank_loads",
    "rank_traffic",
    "stay",
    "weighted_bytes",
]


def stay(problem: PlacementProblem) -> PlacementPlan:
    """Every sequence is rebuilt where it is."""
    return make_plan(problem, "stay", problem.home_rank, never_above_stay=True)


def random_plan(problem: PlacementProblem, *, seed: int = 0) -> PlacementPlan:
    """A random placement that keeps the problem's balance; the same for the same seed.

    By sequences: a random permutation of the present homes. By tokens: every sequence in turn, in random order,
    moves to a random rank, or else trades places with a random sequence there, if that keeps all ranks within budget.
    """
    rng = np.random.default_rng(seed)
    if problem.balance.mode == "sequences":
        return make_plan(problem, "random", rng.permutation(problem.home_rank))
    limit, new_home = budgets(problem), problem.home_rank

    def fits(homes: np.ndarray) -> bool:
        return bool(limit.admit(rank_loads(problem, homes)).all())

    for s in rng.permutation(problem.num_sequences):
        there = rng.integers(problem.num_ranks)
        trial = new_home.copy()
        trial[s] = there
        others = np.flatnonzero(new_home == there)
        if others.size and not fits(trial):
            trial[rng.choice(others)] = new_home[s]
        if fits(trial):
            new_home = trial
    return make_plan(problem, "random", new_home)


STRATEGIES: dict[str, Callable[..., PlacementPlan]] = {
    "stay": stay,
    "luffy_paper": luffy_paper,
    "netmoe": netmoe,
    "exact": exact,
    "best": best,
    "random": random_plan,
}

# Strategies whose plans depend on `PlacementProblem.attention`: through the growth of Algorithm 1, or through the
# budget of attention operations. Where all lengths are equal, none does.
WEIGHS_ATTENTION = frozenset({"luffy_paper", "best", "random"})


def plan_placement(name: str, problem: PlacementProblem, **options: Any) -> PlacementPlan:
    """Plan with the strategy called `name`; options go to it as keyword arguments.

    Raises UserError for a name or an option that does not exist.
    """
    strategy = STRATEGIES.get(name)
    if strategy is None:
        raise UserError(f"placement {name}: no such strategy; choose one of {', '.join(STRATEGIES)}")
    accepted = list(inspect.signature(strategy).parameters)[1:] if options else []
    for option in options:
        if option not in accepted:
            known = ", ".join(accepted) or "none"
            raise UserError(f"placement {name}: no option '{option}'; its options are: {known}")
    return strategy(problem, **options)
