"""What attention costs: the model that keeps sequence migration from piling work on one rank.

Luffy (arXiv 2411.15419, section on sequence migration) prices self-attention of a batch of B sequences, each padded
to L tokens, on an accelerator of P operations per second and model width d as

    T_att(B, L) = 3 B L d^2 / P  +  2 B L^2 d / P,

the projections and the score/value products. Moving sequence i to a rank that holds a (B, L) batch costs that rank
T_att(B + 1, max(L, length_i)) - T_att(B, L): with padding, one long sequence lengthens all its neighbours. Packed
batches have no padding, and the cost is the plain sum of T_att(1, length) over the sequences.

P is not read from a data sheet but fitted to measured times (`fit_attention_cost`). Operation counts are int64 and
exact, and only they enter decisions; seconds are for people. P itself therefore never
changes a plan: what it scales, all ranks share.

What can change one is that a device may run the two terms at different speeds: relative positions write scores to
memory that other kernels keep on the chip, and a narrow model fills a matrix unit badly. `score_cost` says what one
score operation costs in projection operations; in the paper's formula they cost the same. Only powers of two are
fitted, and only where they halve the squared error, so that the noise of a measurement seldom reaches a plan.
"""

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

SCORE_COST_ONE = 64  # fixed-point one of `score_cost`
SCORE_COSTS = (64, 8, 16, 32, 128, 256, 512, 1024, 2048, 4096)  # what a fit may choose, the paper's formula first


@dataclass(frozen=True)
class AttentionCost:
    """T_att of the module docstring for width d = hidden_size and P = flops_per_second.

    score_cost: projection operations that cost as much as SCORE_COST_ONE score operations. Counts are in projection
    operations.

    All methods take scalars or arrays that broadcast and return int64 of the broadcast shape. Lengths are tokens.
    Operation counts are exact below 2**63: at the default score_cost, 4096 sequences of 131072 tokens at width 16384
    still fit.
    Raises ValueError for a width, rate or cost that is not positive.
    """

    hidden_size: int = 1024
    flops_per_second: float = 1e13
    score_cost: int = SCORE_COST_ONE

    def __post_init__(self) -> None:
        if self.hidden_size < 1 or not self.flops_per_second > 0 or self.score_cost < 1:
            raise ValueError(
                f"attention cost: hidden_size {self.hidden_size}, flops_per_second {self.flops_per_second} and "
                f"score_cost {self.score_cost} must be positive"
            )

    def padded_flops(self, num_sequences: ArrayLike, longest: ArrayLike) -> np.ndarray:
        """Operations of a batch of num_sequences padded to `longest` tokens."""
        B = np.asarray(num_sequences, dtype=np.int64)
        L = np.asarray(longest, dtype=np.int64)
        d = self.hidden_size
        return B * L * (3 * d * d + 2 * d * L * self.score_cost // SCORE_COST_ONE)

    def sequence_flops(self, lengths: ArrayLike) -> np.ndarray:
        """Operations of each sequence by itself: what it adds to a packed batch."""
        return self.padded_flops(1, lengths)


@dataclass(frozen=True)
class CostFit:
    """The result of `fit_attention_cost`: seconds = operations / flops_per_second + overhead_seconds.

    The relative errors are |predicted - measured| / measured over the samples that were fitted.
    """

    flops_per_second: float
    overhead_seconds: float
    median_relative_error: float
    max_relative_error: float
    num_samples: int
    score_cost: int = SCORE_COST_ONE

    def attention_cost(self, hidden_size: int) -> AttentionCost:
        """The cost model at this rate. The overhead is left out: every rank pays it wherever sequences go."""
        return AttentionCost(hidden_size, self.flops_per_second, self.score_cost)

    def seconds(self, flops: ArrayLike) -> np.ndarray:
        """What operations of `attention_cost` should take, overhead included."""
        return np.asarray(flops, dtype=np.float64) / self.flops_per_second + self.overhead_seconds


def fit_attention_cost(
    hidden_size: int, samples: Sequence[tuple[int, int, float]], score_costs: Sequence[int] = (SCORE_COST_ONE,)
) -> CostFit:
    """Fit P and a fixed overhead to measured (B, L, seconds) triples of padded attention: see `fit_operations`."""
    if not samples:
        raise ValueError("attention fit: no measured (B, L, seconds) samples")
    table = np.asarray(samples, dtype=np.float64)
    if table.ndim != 2 or table.shape[1] != 3 or not (np.isfinite(table).all() and (table > 0).all()):
        raise ValueError("attention fit: every sample must be (B, L, seconds), all positive and finite")
    B, L, seconds = table[:, 0].astype(np.int64), table[:, 1].astype(np.int64), table[:, 2]
    return fit_operations(lambda c: AttentionCost(hidden_size, score_cost=c).padded_flops(B, L), seconds, score_costs)


def fit_operations(
    count: Callable[[int], ArrayLike], seconds: np.ndarray, score_costs: Sequence[int] = (SCORE_COST_ONE,)
) -> CostFit:
    """Fit P and a fixed overhead to batches that took `seconds` [n]; count(score_cost): their operations [n].

    Least squares on the *relative* error, so that a microsecond batch counts as much as a second-long one:
    minimise sum((flops_i / P + overhead) / seconds_i - 1)^2 with overhead >= 0. Needs samples of at least two
    operation counts to tell rate from overhead; with only one, the overhead is taken as zero.

    score_costs: what `score_cost` may be, the first unless another has at most half its squared error (SCORE_COSTS to
    fit the second rate too). Needs batches of different lengths to tell scores from projections.

    Raises ValueError when time does not grow with the work.
    """

    def fitted(score_cost: int) -> tuple[float, CostFit]:
        flops = np.asarray(count(score_cost), dtype=np.float64)
        fit = _fit_rate(flops, seconds, score_cost)
        return float(np.square(fit.seconds(flops) / seconds - 1).sum()), fit

    first = fitted(score_costs[0])
    fits = [first]
    # Two rates and an overhead go through any three points.
    for score_cost in score_costs[1:] if len(seconds) > 3 else ():
        with contextlib.suppress(ValueError):  # an absurd cost may well leave no rate
            fits.append(fitted(score_cost))
    best = min(fits, key=lambda f: f[0])
    return best[1] if 2 * best[0] <= first[0] else first[1]


def _fit_rate(flops: np.ndarray, seconds: np.ndarray, score_cost: int) -> CostFit:
    """Rate and overhead. flops, seconds: float64 [n]."""
    ratio = flops / seconds
    per_flop, overhead = float(ratio.sum() / (ratio @ ratio)), 0.0
    if len(np.unique(flops)) > 1:
        design = np.stack([ratio, 1 / seconds], axis=1)
        # The columns differ by ten orders of magnitude: scale each to unit norm, or lstsq drops the smaller.
        norm = np.linalg.norm(design, axis=0)
        slope, intercept = np.linalg.lstsq(design / norm, np.ones(len(seconds)), rcond=None)[0] / norm
        if slope <= 0:
            raise ValueError("attention fit: measured time does not grow with the work; measure larger batches")
        if intercept > 0:
            per_flop, overhead = float(slope), float(intercept)
    error = np.abs((flops * per_flop + overhead) / seconds - 1)
    return CostFit(1 / per_flop, overhead, float(np.median(error)), float(error.max()), len(seconds), score_cost)
