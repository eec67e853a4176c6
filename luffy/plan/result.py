"""A placement plan: where each sequence goes, what that is predicted to cost, and how ranks make sure they agree."""

import hashlib
from dataclasses import dataclass

import numpy as np

from luffy.plan.balance import budgets, rank_loads
from luffy.plan.problem import Balance, PlacementProblem
from luffy.plan.traffic import num_bytes_per_class


class PlanError(ValueError):
    """A plan that must not be executed, and why."""


@dataclass(frozen=True, eq=False)
class PlacementPlan:
    """new_home [S] int64: the rank where each sequence is rebuilt.

    num_bytes and stay_num_bytes: predicted bytes per link class (local, intra-node, inter-node) of this plan and of
    not moving at all, combine plus whatever look-ahead the problem prices. `balance` is what the
    strategy promises, which for `exact` and `netmoe` is equal counts whatever the problem asks for.
    `never_above_stay`: the strategy promises not to cost more weighted bytes than staying. `optimal`: no plan with
    the same number of sequences per rank costs less, proved, not hoped. prices [N], femtoseconds, or None: dual
    prices to hand to the next call.
    """

    strategy: str
    new_home: np.ndarray
    balance: Balance
    num_bytes: tuple[int, int, int]
    stay_num_bytes: tuple[int, int, int]
    num_moved: int
    never_above_stay: bool = False
    optimal: bool = False
    prices: np.ndarray | None = None

    def digest(self) -> int:
        """A signed 64-bit fingerprint of new_home, the same on every rank that made the same plan.

        Signed, so that it fits an int64 tensor; little-endian bytes, so that unlike processors agree.
        """
        data = np.ascontiguousarray(self.new_home, dtype="<i8").tobytes()
        return int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "little", signed=True)

    def check(self, problem: PlacementProblem) -> None:
        """Raise PlanError, saying what is wrong, unless this plan may be executed for `problem`."""
        S, N = problem.num_sequences, problem.num_ranks
        name, new_home = f"{self.strategy} plan", self.new_home
        if new_home.shape != (S,) or new_home.dtype != np.int64:
            raise PlanError(f"{name}: new_home is {new_home.dtype} {new_home.shape}, not int64 ({S},)")
        bad = np.flatnonzero((new_home < 0) | (new_home >= N))
        if bad.size:
            raise PlanError(f"{name}: sequence {bad[0]} goes to rank {new_home[bad[0]]} of a world of {N}")
        self._check_balance(problem, name)
        if self.num_bytes != num_bytes_per_class(problem, new_home):
            raise PlanError(f"{name}: predicted bytes {self.num_bytes} are not those of its placement")
        if self.never_above_stay:
            weigh = problem.topology.weighted_bytes
            stay = num_bytes_per_class(problem, problem.home_rank)
            if weigh(self.num_bytes) > weigh(stay):
                raise PlanError(f"{name}: costs {self.num_bytes} bytes per link class, above staying at {stay}")

    def _check_balance(self, problem: PlacementProblem, name: str) -> None:
        loads = rank_loads(problem, self.new_home)
        if self.balance.mode == "sequences":
            wrong = np.flatnonzero(loads.sequences != problem.quotas)
            if wrong.size:
                r = wrong[0]
                raise PlanError(f"{name}: rank {r} gets {loads.sequences[r]} sequences, must keep {problem.quotas[r]}")
            return
        limit = budgets(problem)
        over = np.flatnonzero(~limit.admit(loads))
        if over.size:
            r = over[0]
            raise PlanError(
                f"{name}: rank {r} gets {loads.tokens[r]} tokens and {loads.attention_flops[r]} attention operations; "
                f"the budget is {limit.tokens} and {limit.attention_flops}"
            )


def make_plan(
    problem: PlacementProblem,
    strategy: str,
    new_home: np.ndarray,
    *,
    balance: Balance | None = None,
    never_above_stay: bool = False,
    optimal: bool = False,
    prices: np.ndarray | None = None,
) -> PlacementPlan:
    """Price new_home and wrap it. With never_above_stay, a new_home that would cost as much as staying becomes stay.

    The comparison is made in exact integers on the true link weights, whatever rounding the strategy used inside.
    """
    new_home = np.array(new_home, dtype=np.int64)
    stay_bytes = num_bytes_per_class(problem, problem.home_rank)
    plan_bytes = num_bytes_per_class(problem, new_home)
    weigh = problem.topology.weighted_bytes
    if never_above_stay and weigh(plan_bytes) >= weigh(stay_bytes):
        new_home, plan_bytes = problem.home_rank.copy(), stay_bytes
    num_moved = int(np.count_nonzero(new_home != problem.home_rank))
    return PlacementPlan(
        strategy,
        new_home,
        balance or problem.balance,
        plan_bytes,
        stay_bytes,
        num_moved,
        never_above_stay,
        optimal,
        prices,
    )
