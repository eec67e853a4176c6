"""What a placement asks of each rank, and the budgets it is held to when lengths are uneven.

Two loads count: tokens (memory, and every per-token layer) and attention operations (quadratic in length, and with
padding dependent on the longest neighbour). Both are exact int64 so that all ranks agree to the last bit on what fits.
"""

from typing import NamedTuple

import numpy as np

from luffy.plan.problem import PlacementProblem


class RankLoads(NamedTuple):
    """int64 [N] each: what every rank holds under some placement."""

    sequences: np.ndarray
    tokens: np.ndarray
    longest: np.ndarray
    attention_flops: np.ndarray


class Budgets(NamedTuple):
    """The most that any single rank may hold."""

    tokens: int
    attention_flops: int

    def admit(self, loads: RankLoads) -> np.ndarray:
        """bool [N]: ranks whose loads are within both budgets."""
        return (loads.tokens <= self.tokens) & (loads.attention_flops <= self.attention_flops)


def rank_loads(problem: PlacementProblem, new_home: np.ndarray) -> RankLoads:
    """What each rank holds when sequence s lives at new_home[s]. new_home: int64 [S], every entry a valid rank."""
    N, attention, lengths = problem.num_ranks, problem.attention, problem.lengths
    sequences = np.bincount(new_home, minlength=N)
    tokens = np.zeros(N, dtype=np.int64)
    longest = np.zeros(N, dtype=np.int64)
    np.add.at(tokens, new_home, lengths)
    np.maximum.at(longest, new_home, lengths)
    if problem.layout == "padded":
        flops = attention.padded_flops(sequences, longest)
    else:
        flops = np.zeros(N, dtype=np.int64)
        np.add.at(flops, new_home, attention.sequence_flops(lengths))
    return RankLoads(sequences, tokens, longest, flops)


def budget(loads: np.ndarray, total: int, slack: float) -> int:
    """The most that a rank may hold: (1 + slack) times the mean of `total`, or what the busiest holds now if more.

    loads: int64 [N], what ranks hold now, so that staying always fits. Slack granted on top of the busiest rank would
    be granted anew by every plan that starts from the last one's: a tenth a layer is three times the mean after twelve.
    """
    mean = total // len(loads)
    return max(int(loads.max()), mean + int(mean * slack))


def budgets(problem: PlacementProblem) -> Budgets:
    """Budgets of tokens and of attention operations.

    Means are of sequences alone, whatever their homes (attention without its padding), so that budgets are the same
    in all layers of a step.
    """
    now, slack = rank_loads(problem, problem.home_rank), problem.balance.slack
    flops = problem.attention.sequence_flops(problem.lengths)
    return Budgets(
        budget(now.tokens, int(problem.lengths.sum()), slack),
        budget(now.attention_flops, int(flops.sum()), slack),
    )
