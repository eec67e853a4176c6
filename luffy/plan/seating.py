"""A first assignment under equal counts: deferred acceptance, then one small exact assignment.

Every sequence applies to the rank it would gain most from at the going prices (prices.py). A rank with more
applicants than room keeps those who would lose most elsewhere; the rest apply again, to ranks that still have room
(Gale and Shapley's deferred acceptance, without the bumping). Each round is a few whole-array passes over the few
sequences left; the last 64 are assigned exactly. What this leaves on the table, a few tenths of a percent,
cyclic.py picks up.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

# Assigning more than this exactly costs more time than the exchange needs to repair a rougher tail.
_EXACT_TAIL = 64
_MAX_ROUNDS = 8
_CLOSED = np.int32(-(1 << 29))


def seat(benefit: np.ndarray, quotas: np.ndarray, home_rank: np.ndarray) -> np.ndarray:
    """Assign every sequence to a rank, quotas[j] to rank j. benefit: int32 [S, N], |entries| < 2**28, already priced.

    Returns int64 [S]. Equal choices go to the present home, else to the lowest rank.
    """
    S, N = benefit.shape
    everyone = np.arange(S)
    choice = benefit.argmax(axis=1)
    choice = np.where(benefit[everyone, home_rank] == benefit[everyone, choice], home_rank, choice)
    assigned = choice.copy()
    applicants, offers, room = everyone, benefit, quotas
    for _ in range(_MAX_ROUNDS):
        refused = _refused(offers, choice, room)
        room = room - np.bincount(choice, minlength=N) + np.bincount(choice[refused], minlength=N)
        applicants = applicants[refused]
        if applicants.size <= _EXACT_TAIL:
            break
        offers = benefit.take(applicants, axis=0)
        offers[:, room == 0] = _CLOSED
        choice = offers.argmax(axis=1)
        assigned[applicants] = choice
    if applicants.size:
        open_slots = np.repeat(np.arange(N), room)
        if applicants.size <= _EXACT_TAIL:
            offers = benefit[applicants[:, None], open_slots]
            open_slots = open_slots[linear_sum_assignment(offers, maximize=True)[1]]
        assigned[applicants] = open_slots  # a long tail means near-identical sequences: any order is near-optimal
    return assigned


def _refused(offers: np.ndarray, choice: np.ndarray, room: np.ndarray) -> np.ndarray:
    """Indices of applicants whom their chosen rank has no room for: those who lose least by going elsewhere."""
    over = np.bincount(choice, minlength=len(room)) > room
    contested = np.flatnonzero(over[choice])
    if not contested.size:
        return contested
    rows, chosen = np.arange(contested.size), choice[contested]
    offers = offers.take(contested, axis=0)
    best = offers[rows, chosen]
    offers[rows, chosen] = _CLOSED
    regret = (best - offers[rows, offers.argmax(axis=1)]).astype(np.int64)  # argmax beats max on int32 rows
    order = np.argsort((chosen << 32) - regret, kind="stable")  # by rank, then greatest regret, then index
    ranks = chosen[order]
    applications = np.bincount(ranks, minlength=len(room))
    position = rows - (np.cumsum(applications) - applications)[ranks]
    return contested[order[position >= room[ranks]]]
