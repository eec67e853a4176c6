"""Outlook: what a sequence's choices in the first MoE layer foretell of all later ones.

A sequence that lives with its experts in every layer need not move in every layer. Once experts are re-homed so that
those of the same sequences share ranks, layer after layer, where a sequence should live is nearly the same everywhere;
and the first layer's choices say where that is. A recipe that *settles* moves sequences once, behind the first MoE
layer, weighing what all later ones are expected to send, and leaves them there: eleven of twelve plans and rebuilds
fall away, and rows that no longer carry residuals can travel in few bits.

Learnt by ridge regression from recorded steps, where re-homing records them anyway: counts of a sequence's tokens by
expert in the first layer to counts by expert in each later one. What that means in rows depends on which experts share
a rank, where a token sends one row for all of them: a rank with experts f is expected to get

    length * (1 - prod_f (1 - count_f / length))

rows, as if choices were independent. All ranks must get the same integers: coefficients are fixed-point numbers, sums
of whose products float64 holds exactly in any order, and the rest is one rounding at a time.
"""

from collections.abc import Sequence

import numpy as np

from luffy.plan.trace import TraceStep

_ONE = 1 << 20  # coefficients are in units of 1 / _ONE
_RIDGE = 0.02  # of the mean squared count of an expert


def learn_outlook(steps: Sequence[TraceStep], num_experts: int) -> np.ndarray:
    """int64 [E, layers - 1, E], fixed point: tokens by expert of each later layer, for one at each of the first."""
    x = np.concatenate([s.counts_by_expert(0, num_experts) for s in steps]).astype(np.float64)
    later = range(1, steps[0].num_layers)
    y = [np.concatenate([s.counts_by_expert(layer, num_experts) for s in steps]) for layer in later]
    square = x.T @ x
    ridge = _RIDGE * max(float(np.trace(square)) / num_experts, 1.0)
    target = x.T @ np.concatenate(y, axis=1) if y else np.zeros((num_experts, 0))
    found = np.linalg.solve(square + ridge * np.eye(num_experts), target)
    return np.rint(found * _ONE).astype(np.int64).reshape(num_experts, len(later), num_experts)


def expected_rows(
    outlook: np.ndarray, counts: np.ndarray, lengths: np.ndarray, owners: np.ndarray, num_ranks: int
) -> np.ndarray:
    """int64 [S, N]: rows that each sequence is expected to send to each rank in all later layers together.

    outlook: of `learn_outlook`. counts int64 [S, E]: its tokens by expert of the first layer. lengths [S].
    owners [layers - 1, E]: the rank of each expert of the later layers, equally many on each.
    """
    S, (E, later, _) = len(counts), outlook.shape
    # Whole numbers below 2^53, so that a product of matrices is exact whoever computes it.
    foretold = counts.astype(np.float64) @ outlook.reshape(E, -1).astype(np.float64) / _ONE
    length = lengths.astype(np.float64)[:, None, None]
    missed = 1.0 - np.clip(foretold.reshape(S, later, E), 0.0, length) / np.maximum(length, 1.0)
    by_rank = np.argsort(owners, axis=1, kind="stable").reshape(later, num_ranks, E // num_ranks)
    layer = np.arange(later)[:, None]
    alone = np.ones((S, later, num_ranks))
    for i in range(E // num_ranks):
        alone = alone * missed[:, layer, by_rank[:, :, i]]
    return np.rint(length * (1.0 - alone)).astype(np.int64).sum(axis=1)
