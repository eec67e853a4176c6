"""The `best` strategy: within a fraction of a percent of the optimum, in about a millisecond, never above staying.

Under equal counts: market-clearing prices and deferred acceptance seat the sequences (seating.py), a few rounds of
cyclic exchange polish the result (cyclic.py), and the plan is compared with staying in exact arithmetic. Under
token budgets: best_uneven.py. Everything is int32 or integers inside doubles; nothing depends on the processor.

Total bytes first, bottleneck nearly for free: the busiest link of a rank is that of the rank with the most popular
experts, and what leaves it is its rows less what placement keeps on it, so keeping more rows at home anywhere
mostly helps there too. Against the linear-programming lower bound of the bottleneck (16 and 32 ranks, skewed and
clustered synthetic traces), the plan of least total bytes was within 1.1%. `bottleneck_weight` closes most of the
rest: rows held at a rank that holds more than its share count that much more, e.g. 0.5 gave up 0.05% of total bytes
at most in the same trials.
"""

import numpy as np

from luffy.errors import UserError
from luffy.plan.best_uneven import place_uneven
from luffy.plan.cyclic import exchange
from luffy.plan.exact import assign
from luffy.plan.prices import clearing_prices
from luffy.plan.problem import PlacementProblem
from luffy.plan.result import PlacementPlan, make_plan
from luffy.plan.seating import seat
from luffy.plan.traffic import benefit_matrix

_BITS = 27  # of the benefit matrix: prices and their differences must stay below cyclic's and seating's 2**28
_WEIGHT_ONE = 64  # fixed-point one for bottleneck weights


def default_rounds(num_ranks: int) -> int:
    """Rounds of cyclic exchange worth their time: a round moves at most one sequence per rank."""
    return int(np.clip(96 // max(1, num_ranks), 1, 12))


def best(
    problem: PlacementProblem,
    *,
    rounds: int | None = None,
    prices: np.ndarray | None = None,
    bottleneck_weight: float = 0.0,
) -> PlacementPlan:
    """Near-optimal balanced placement.

    rounds: rounds of exchange, the dial between time and quality; None chooses by the number of ranks and stops
    when a round gains less than one part in 10,000. With enough rounds (a few dozen) the plan is optimal and says
    so. prices: `PlacementPlan.prices` of an earlier plan for the same layer, float64 [N] femtoseconds, replaces the
    estimate that is otherwise made from the batch itself. That saves a sixth of the time, but other sequences have
    other favourites: one earlier batch's prices gave gaps 2 to 10 times those of the estimate, so this is off by
    default. bottleneck_weight >= 0: see the module docstring. Raises UserError for options that make no sense.
    """
    if rounds is not None and rounds < 0:
        raise UserError(f"placement best: rounds={rounds} must be >= 0")
    if not bottleneck_weight >= 0:
        raise UserError(f"placement best: bottleneck_weight={bottleneck_weight} must be >= 0")
    if prices is not None and np.shape(prices) != (problem.num_ranks,):
        raise UserError(f"placement best: prices has shape {np.shape(prices)}, not ({problem.num_ranks},)")
    if problem.num_sequences == 0 or problem.num_ranks == 1:
        return make_plan(problem, "best", problem.home_rank, never_above_stay=True, optimal=True, prices=prices)

    benefit = benefit_matrix(problem, _BITS, _row_weights(problem, bottleneck_weight))
    values, unit = benefit.values, benefit.unit_femtoseconds
    if problem.balance.mode == "tokens":
        new_home = place_uneven(problem, values, rounds)
        return make_plan(problem, "best", new_home, never_above_stay=True)

    quotas = problem.quotas
    if int(quotas.max()) == 1:
        # One sequence a rank is a plain assignment problem, no larger than one round of exchange.
        new_home = assign(values, quotas)
        return make_plan(problem, "best", new_home, never_above_stay=True, optimal=benefit.exact, prices=prices)
    if prices is None:
        column = clearing_prices(benefit, quotas)
    else:
        column = _to_units(prices, unit)
    # Ranks that hold nothing now get nothing: leave their columns out.
    ranks = np.flatnonzero(quotas)
    values = values - column if ranks.size == quotas.size else values[:, ranks] - column[ranks]
    quotas = quotas[ranks]
    assigned = seat(values, quotas, np.searchsorted(ranks, problem.home_rank))
    tolerance = 0
    if rounds is None:
        rounds = default_rounds(ranks.size)
        kept = values[np.arange(len(values)), assigned].sum(dtype=np.int64)
        tolerance = int(kept + column[ranks].astype(np.int64) @ quotas) // 10_000
    polished = exchange(values, assigned, quotas, rounds, tolerance)
    new_prices = column.astype(np.float64)
    new_prices[ranks] += polished.potentials
    return make_plan(
        problem,
        "best",
        ranks[polished.assigned],
        never_above_stay=True,
        optimal=polished.optimal and benefit.exact,
        prices=(new_prices - new_prices.min()) * unit,
    )


def _to_units(prices: np.ndarray, unit: float) -> np.ndarray:
    """Femtoseconds -> int32 [N] in units of the benefit matrix, the cheapest rank at 0."""
    finite = np.nan_to_num(np.asarray(prices, dtype=np.float64), posinf=0.0, neginf=0.0)
    return np.rint(np.clip((finite - finite.min()) / unit, 0, 2**_BITS - 1)).astype(np.int32)


def _row_weights(problem: PlacementProblem, bottleneck_weight: float) -> np.ndarray | None:
    """int64 [N]: 64ths by which rows at each rank count more, for ranks that hold more than the mean."""
    if not bottleneck_weight:
        return None
    held = problem.rows.sum(axis=0)
    mean = max(1, int(held.sum()) // problem.num_ranks)
    excess = np.minimum(held // max(1, mean // _WEIGHT_ONE), 4 * _WEIGHT_ONE) - _WEIGHT_ONE
    return np.maximum(_WEIGHT_ONE + np.floor(excess * bottleneck_weight).astype(np.int64), _WEIGHT_ONE // 2)
