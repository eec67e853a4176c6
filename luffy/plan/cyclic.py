"""Cyclic exchange: improve an assignment without touching its balance, until no improvement exists.

Let D[a, b] be the most that any sequence now on rank a would gain by moving to b (0 on the diagonal). Choose a
permutation of the ranks: every rank hands one sequence to the next, or keeps what it has. Counts cannot change, and
the permutation of greatest total gain is one N x N assignment problem, solved in tens of microseconds at N = 64
however many sequences there are. Up to N sequences move at once, in all cycles that pay together.

When the best permutation gains nothing, there is no improving cycle in the residual graph of the transportation
problem, which is the textbook certificate of optimality (Klein 1967): the assignment is *the* optimum, not a local
one. Rounds therefore trade time for quality all the way to exact. (The neighbourhood is Thompson and Orlin's cyclic
transfer, 1989; because sequences weigh the same under equal counts, its best move is found in polynomial time, not
by heuristics.)

Potentials p, with p[b] >= p[a] + D[a, b] as nearly as a couple of Bellman-Ford passes bring them, are the dual
prices of the ranks. Reduced by them most entries of D are negative, and at 64 ranks the assignment solver is two to
four times faster; left over at the end, they are a warm start for the next layer or step.
"""

from typing import NamedTuple

import numpy as np
from scipy.optimize import linear_sum_assignment

_NEVER = -(1 << 30)
_POTENTIAL_PASSES = 2
_MAX_PADDING = 8


class Exchange(NamedTuple):
    """assigned int64 [S]; potentials float64 [N] holding integers; optimal: no improving cycle is left."""

    assigned: np.ndarray
    potentials: np.ndarray
    optimal: bool


def exchange(
    benefit: np.ndarray, assigned: np.ndarray, quotas: np.ndarray, rounds: int, tolerance: int = 0
) -> Exchange:
    """Up to `rounds` rounds of cyclic exchange on benefit int32 [S, N], |entries| < 2**28.

    assigned [S] must hold quotas[j] sequences at rank j; the result does too and never has less total benefit. Stops
    early when a round would gain no more than `tolerance`, with tolerance 0 at the optimum. Ranks are padded to the
    largest quota; where that is more than 8 times the mean, nothing is tried.
    """
    N = len(quotas)
    ranks = np.arange(N)
    potentials = np.zeros(N)
    if not assigned.size:
        return Exchange(assigned, potentials, True)
    if N * int(quotas.max()) > _MAX_PADDING * assigned.size:
        return Exchange(assigned, potentials, False)
    slots, empty = _slots(assigned, quotas)
    gains = benefit.take(slots.ravel(), axis=0).reshape(*slots.shape, N)
    gains -= gains[ranks, :, ranks][:, :, None]
    if empty is not None:
        gains[empty] = _NEVER

    optimal = False
    for _ in range(rounds):
        step = gains.max(axis=1).astype(np.float64)
        if empty is not None:
            np.fill_diagonal(step, 0)  # a rank of quota 0 has nothing to hand on, and takes nothing
        for _ in range(_POTENTIAL_PASSES):
            potentials = (step + potentials[:, None]).max(axis=0)
        # Doubles that hold integers below 2**53: sums and comparisons are exact, so every rank agrees.
        receiver = linear_sum_assignment(potentials - potentials[:, None] - step)[1]
        givers = np.flatnonzero(receiver != ranks)
        takers = receiver[givers]
        total = int(step[givers, takers].sum())
        if total <= tolerance:
            optimal = total <= 0
            break
        given = gains[givers, :, takers].argmax(axis=1)
        moved = gains[givers, given]
        moved -= moved[np.arange(givers.size), takers][:, None]
        moved_slots = slots[givers, given]
        # Each rank of a cycle receives into the slot it has just emptied.
        emptied = np.empty(N, dtype=np.int64)
        emptied[givers] = given
        gains[takers, emptied[takers]] = moved
        slots[takers, emptied[takers]] = moved_slots

    result = np.empty_like(assigned)
    owner = np.broadcast_to(ranks[:, None], slots.shape)
    if empty is None:
        result[slots] = owner
    else:
        result[slots[~empty]] = owner[~empty]
    return Exchange(result, potentials - potentials.min(), optimal)


def _slots(assigned: np.ndarray, quotas: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Sequences by rank, int64 [N, max quota], and which slots are padding (None when all ranks are full)."""
    order = np.argsort(assigned, kind="stable")
    N, width = len(quotas), int(quotas.max())
    if N * width == order.size:
        return order.reshape(N, width), None
    filled = np.arange(width) < quotas[:, None]
    slots = np.zeros((N, width), dtype=np.int64)
    slots[filled] = order
    return slots, ~filled
