"""`best` for uneven lengths: budgets of tokens and attention operations instead of equal counts.

Sequences of different length are not interchangeable, and assigning them under budgets is a generalised assignment problem
(it contains bin packing), so there is no certificate of optimality here. The method has the same two steps as
under equal counts, each with a feasibility test:

* seat: every sequence applies to the rank it gains most from among those where it fits; a rank admits applicants
  in order of what they would lose elsewhere, as far as its budgets reach; the rest apply again. What is left after a few
  rounds is placed one at a time, longest first. If anything fits nowhere, everybody starts from home instead.
* exchange: the best permutation of ranks as in cyclic.py, where a rank may also hand on nothing, so that paths (moves)
  are found beside cycles (swaps). A cycle that would burst a budget is dropped whole, and the move that burst it is
  forbidden from then on.

Staying is within budget by definition, and both steps only ever go from one plan within budget to another.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from luffy.plan.balance import Budgets, RankLoads, budgets, rank_loads
from luffy.plan.problem import PlacementProblem

_NEVER = np.int32(-(1 << 29))
_SEATING_ROUNDS = 6


def place_uneven(problem: PlacementProblem, benefit: np.ndarray, rounds: int) -> np.ndarray:
    """int64 [S]: a placement within both budgets. benefit: int32 [S, N], |entries| < 2**28."""
    limit = budgets(problem)
    everyone = np.arange(problem.num_sequences)
    seated = _seat(problem, benefit, limit)
    stays = benefit[everyone, problem.home_rank].sum(dtype=np.int64)
    if seated is None or benefit[everyone, seated].sum(dtype=np.int64) < stays:
        seated = problem.home_rank
    return _exchange(problem, benefit.copy(), seated, limit, rounds)


def _seat(problem: PlacementProblem, benefit: np.ndarray, limit: Budgets) -> np.ndarray | None:
    S, N = benefit.shape
    assigned = np.full(S, N, dtype=np.int64)  # N: not seated yet
    waiting = np.arange(S)
    loads = RankLoads(*(np.zeros(N, dtype=np.int64) for _ in RankLoads._fields))
    for _ in range(_SEATING_ROUNDS):
        offers = benefit.take(waiting, axis=0)
        offers[~_fits(problem, loads, problem.lengths[waiting], limit)] = _NEVER
        choice = offers.argmax(axis=1)
        rows = np.arange(waiting.size)
        best = offers[rows, choice]
        offers[rows, choice] = _NEVER
        regret = (best - offers[rows, offers.argmax(axis=1)]).astype(np.int64)
        choice = np.where(best == _NEVER, N, choice)
        order = np.argsort((choice << 32) - regret, kind="stable")
        admitted = order[_admitted(problem, loads, problem.lengths[waiting[order]], choice[order], limit)]
        assigned[waiting[admitted]] = choice[admitted]
        loads = _loads_of(problem, assigned)
        remaining = np.ones(waiting.size, dtype=bool)
        remaining[admitted] = False
        waiting = waiting[remaining]
        if not waiting.size or not admitted.size:
            break
    return _seat_one_by_one(problem, benefit, limit, assigned, waiting)


def _seat_one_by_one(
    problem: PlacementProblem, benefit: np.ndarray, limit: Budgets, assigned: np.ndarray, waiting: np.ndarray
) -> np.ndarray | None:
    """Seat what the rounds left over, longest first; None when something fits nowhere."""
    loads = _loads_of(problem, assigned)
    for s in waiting[np.argsort(-problem.lengths[waiting], kind="stable")]:
        length = problem.lengths[s : s + 1]
        fits = _fits(problem, loads, length, limit)[0]
        if not fits.any():
            return None
        rank = int(np.where(fits, benefit[s], _NEVER).argmax())
        assigned[s] = rank
        tokens, flops = _grown(problem, loads, length)
        loads.tokens[rank], loads.attention_flops[rank] = tokens[0, rank], flops[0, rank]
        loads.sequences[rank] += 1
        loads.longest[rank] = max(loads.longest[rank], length[0])
    return assigned


def _loads_of(problem: PlacementProblem, assigned: np.ndarray) -> RankLoads:
    """Loads of those already seated: the others wait on an extra rank N."""
    N, lengths, attention = problem.num_ranks, problem.lengths, problem.attention
    sequences = np.bincount(assigned, minlength=N + 1)
    tokens, longest, flops = (np.zeros(N + 1, dtype=np.int64) for _ in range(3))
    np.add.at(tokens, assigned, lengths)
    np.maximum.at(longest, assigned, lengths)
    if problem.layout == "padded":
        flops = attention.padded_flops(sequences, longest)
    else:
        np.add.at(flops, assigned, attention.sequence_flops(lengths))
    return RankLoads(sequences[:N], tokens[:N], longest[:N], flops[:N])


def _grown(problem: PlacementProblem, loads: RankLoads, lengths: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and attention operations [n, N] of each rank if each one of n sequences joined it alone."""
    tokens = loads.tokens + lengths[:, None]
    if problem.layout == "padded":
        longest = np.maximum(loads.longest, lengths[:, None])
        return tokens, problem.attention.padded_flops(loads.sequences + 1, longest)
    return tokens, loads.attention_flops + problem.attention.sequence_flops(lengths)[:, None]


def _fits(problem: PlacementProblem, loads: RankLoads, lengths: np.ndarray, limit: Budgets) -> np.ndarray:
    tokens, flops = _grown(problem, loads, lengths)
    return (tokens <= limit.tokens) & (flops <= limit.attention_flops)


def _admitted(
    problem: PlacementProblem, loads: RankLoads, lengths: np.ndarray, ranks: np.ndarray, limit: Budgets
) -> np.ndarray:
    """bool [n]: who gets in when applicants, sorted by rank and urgency, join in that order.

    Loads are counted over all who stand before, admitted or not: one that is refused may close the door on shorter ones
    behind it, who apply again next round with the refused one out of the way.
    """
    N = len(loads.tokens)
    first = np.searchsorted(ranks, np.arange(N + 1))

    def running(values: np.ndarray, held: np.ndarray) -> np.ndarray:
        total = np.cumsum(values)
        before = (total - values)[np.minimum(first, len(values) - 1)]
        return total - before[ranks] + np.append(held, 0)[ranks]

    tokens = running(lengths, loads.tokens)
    if problem.layout == "padded":
        # A running maximum within each rank: lift every rank above all lengths of the ranks before it.
        lift = ranks * (int(lengths.max()) + 1)
        longest = np.maximum(np.maximum.accumulate(lengths + lift) - lift, np.append(loads.longest, 0)[ranks])
        flops = problem.attention.padded_flops(running(np.ones_like(lengths), loads.sequences), longest)
    else:
        flops = running(problem.attention.sequence_flops(lengths), loads.attention_flops)
    return (ranks < N) & (tokens <= limit.tokens) & (flops <= limit.attention_flops)


def _exchange(
    problem: PlacementProblem, benefit: np.ndarray, assigned: np.ndarray, limit: Budgets, rounds: int
) -> np.ndarray:
    """Up to `rounds` improving permutations. `benefit` is used up: forbidden moves are written into it."""
    N, lengths = problem.num_ranks, problem.lengths
    ranks, everyone = np.arange(N), np.arange(problem.num_sequences)
    for _ in range(rounds):
        loads = rank_loads(problem, assigned)
        gains = benefit - benefit[everyone, assigned][:, None]
        # Even if a rank hands on its longest sequence, this one would not fit.
        gains[lengths[:, None] > limit.tokens - loads.tokens + loads.longest] = _NEVER
        order = np.argsort(assigned, kind="stable")
        occupied = np.flatnonzero(loads.sequences)
        starts = np.searchsorted(assigned[order], occupied)
        step = np.zeros((N, N))
        step[occupied] = np.maximum(np.maximum.reduceat(gains[order], starts, axis=0), 0)
        np.fill_diagonal(step, 0)
        receiver = linear_sum_assignment(-step)[1]

        offer = gains[everyone, receiver[assigned]]
        # Of each rank, the sequence that gains most by going where the rank hands on; the first of equals.
        by_gain = order[np.lexsort((-offer[order], assigned[order]))]
        movers = by_gain[starts]
        movers = movers[offer[movers] > 0]
        if not movers.size:
            break
        trial = assigned.copy()
        trial[movers] = receiver[assigned[movers]]
        burst = ~limit.admit(rank_loads(problem, trial))
        if burst.any():
            benefit[movers[burst[trial[movers]]], trial[movers[burst[trial[movers]]]]] = _NEVER
            dropped = _cycles_through(receiver, burst)
            kept = movers[~dropped[assigned[movers]]]
            trial = assigned.copy()
            trial[kept] = receiver[assigned[kept]]
        assigned = trial
    return assigned


def _cycles_through(receiver: np.ndarray, marked: np.ndarray) -> np.ndarray:
    """bool [N]: ranks on a cycle of the permutation that has a marked rank. Doubles the reach each pass."""
    marked, reach = marked.copy(), receiver
    for _ in range(len(receiver).bit_length()):
        marked = marked | marked[reach]
        reach = reach[reach]
    return marked
