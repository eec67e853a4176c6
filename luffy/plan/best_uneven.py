"""`best` for uneven lengths: budgets of tokens and attention operations instead of equal counts.

Sequences of different length are not interchangeable, and assigning them under budgets is a generalised assignment
problem (it contains bin packing), so there is no certificate of optimality here. The method has the same two steps
as under equal counts, each with a feasibility test:

* seat: every sequence applies to the rank it gains most from among those where it fits; a rank admits applicants in
  order of what they would lose elsewhere, as far as its budgets reach; the rest apply again. What is left after a
  few rounds is placed one at a time, longest first. If anything fits nowhere, everybody starts from home instead.
* swap: sequences trade places with others of nearly their length (the next 32 when sorted by length), which hardly
  moves either load. All swaps that gain and fit are found at once; those that share no sequence and together stay
  within budget are made at once.

A search by permutations of ranks, as in cyclic.py, was tried in place of the swaps: almost every improving cycle
burst some budget, and wherever seating had succeeded it gained nothing.

Measured against the linear-programming bound (256 sequences of log-normal length, 16 ranks, synthetic): 0-1.4% above it
at a slack of 0.1; with no slack and loads already level, where only swaps are possible, 2-7%.

Staying is within budget by definition, and both steps only ever go from one plan within budget to another.
"""

import numpy as np

from luffy.plan.balance import Budgets, RankLoads, budgets, rank_loads
from luffy.plan.problem import PlacementProblem

_NEVER = np.int32(-(1 << 29))
_SEATING_ROUNDS = 6
_WINDOW = 32


def place_uneven(problem: PlacementProblem, benefit: np.ndarray, rounds: int | None = None) -> np.ndarray:
    """int64 [S]: a placement within both budgets. benefit: int32 [S, N], |entries| < 2**28.

    rounds: rounds of swaps; None: 4, or 24 where budgets are so tight that swaps must do all the work from home.
    """
    limit = budgets(problem)
    everyone = np.arange(problem.num_sequences)
    seated = _seat(problem, benefit, limit)
    stays = benefit[everyone, problem.home_rank].sum(dtype=np.int64)
    from_home = seated is None or benefit[everyone, seated].sum(dtype=np.int64) < stays
    if seated is None or from_home:
        seated = problem.home_rank
    if rounds is None:
        rounds = 24 if from_home else 4
    return _swap(problem, benefit, seated, limit, rounds)


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

    Loads are counted over all who stand before, admitted or not: one that is refused may close the door on shorter
    ones behind it, who apply again next round with the refused one out of the way.
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


def _swap(
    problem: PlacementProblem, benefit: np.ndarray, assigned: np.ndarray, limit: Budgets, rounds: int
) -> np.ndarray:
    """Up to `rounds` rounds of swaps between sequences that are neighbours by length."""
    S, lengths = problem.num_sequences, problem.lengths
    flops = problem.attention.sequence_flops(lengths)
    by_length = np.argsort(lengths, kind="stable")
    offsets = np.arange(1, min(_WINDOW, S - 1) + 1)
    left = np.repeat(np.arange(S), offsets.size)
    right = left + np.tile(offsets, S)
    left, right = by_length[left[right < S]], by_length[right[right < S]]
    growth = lengths[right] - lengths[left], flops[right] - flops[left]  # >= 0: of the shorter one's rank
    for _ in range(rounds):
        loads = rank_loads(problem, assigned)
        own = benefit[np.arange(S), assigned]
        here, there = assigned[left], assigned[right]
        gain = benefit[left, there] - own[left] + benefit[right, here] - own[right]
        fits = (gain > 0) & (growth[0] <= (limit.tokens - loads.tokens)[here])
        if problem.layout == "padded":
            # Counts stay, so only a longer longest can cost: a test of each swap by itself, whatever the others do.
            longest = np.maximum(loads.longest[here], lengths[right])
            fits &= problem.attention.padded_flops(loads.sequences[here], longest) <= limit.attention_flops
        else:
            fits &= growth[1] <= (limit.attention_flops - loads.attention_flops)[here]
        candidates = np.flatnonzero(fits)
        candidates = candidates[np.argsort(-gain[candidates], kind="stable")]
        # Gains add up only if no sequence takes part twice: keep swaps that come first for both of theirs.
        place = np.arange(candidates.size)
        first = np.full(S, candidates.size)
        np.minimum.at(first, left[candidates], place)
        np.minimum.at(first, right[candidates], place)
        candidates = candidates[(first[left[candidates]] == place) & (first[right[candidates]] == place)]
        # Counting what each rank would grow by, and never what it would shrink by, leaves any subset within budget.
        admitted = _within(assigned[left[candidates]], growth[0][candidates], limit.tokens - loads.tokens)
        if problem.layout == "packed":
            room = limit.attention_flops - loads.attention_flops
            admitted &= _within(assigned[left[candidates]], growth[1][candidates], room)
        candidates = candidates[admitted]
        if not candidates.size:
            break
        s, t = left[candidates], right[candidates]
        assigned = assigned.copy()
        assigned[s], assigned[t] = assigned[t], assigned[s]
    return assigned


def _within(ranks: np.ndarray, growth: np.ndarray, room: np.ndarray) -> np.ndarray:
    """bool [n]: whether the running sum of growth at each one's rank, in the order given, stays within room [N]."""
    order = np.argsort(ranks, kind="stable")
    total = np.cumsum(growth[order])
    first = np.searchsorted(ranks[order], ranks[order])
    before = total[first] - growth[order][first] if order.size else total
    within = np.empty(order.size, dtype=bool)
    within[order] = total - before <= room[ranks[order]]
    return within
