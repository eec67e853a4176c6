"""Rows that a sequence will send to each rank in all MoE layers together, predicted from its features.

Ridge regression, centred, of rows per token on features; a sequence counts as often as it has tokens. What it needs of
the past are sums over sequences (moments), which are added up as they come, over ranks too, and fade at every refresh:
the routers that they describe move on while a model trains.

Fitting is done in float64 by whoever does it; what it finds are integers in fixed point, to be taken from one rank by
all (luffy.seats.sharing). From there everybody counts alike: products are whole numbers below 2^53, which float64 adds
up exactly in any order.
"""

import numpy as np
import torch
from torch import Tensor

from luffy.seats.features import DIM

_ONE = 1 << 28  # coefficients are in units of 1 / _ONE
_LARGEST = 1 << 30  # DIM features below 2^15 times coefficients up to this: sums up to 2^53
_MOST_PER_TOKEN = 1 << 42  # 2^14 rows a token and rank; times lengths below 2^20, less than 2^62
_RIDGE = 0.1  # of the mean variance of a feature
FADE = 0.5  # what is left of old moments at a refresh


class RowPredictor:
    """`observe` sequences, `solve`, then `predict` others. num_ranks: of the expert-parallel group."""

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.moments = np.zeros((1 + DIM, 1 + DIM + num_ranks))
        """Sums over sequences of length x [1, features] x [1, features, rows per token]."""
        self.coefficients: np.ndarray | None = None
        """int64 [1 + DIM, N]: rows per token, first for the constant 1, then for each feature; None before `solve`."""

    def observe(self, features: np.ndarray, lengths: np.ndarray, rows: np.ndarray) -> None:
        """Add sequences. features [S, DIM] (luffy.seats.features), lengths [S], rows [S, N] summed over layers."""
        x = np.concatenate([np.ones((len(lengths), 1)), features], axis=1)
        self.moments += x.T @ np.concatenate([x * lengths[:, None], rows], axis=1)

    def fade(self) -> None:
        """Make what was observed count half as much beside what comes."""
        self.moments *= FADE

    def forget(self) -> None:
        """Drop all that was observed and found, as when experts have moved."""
        self.moments[:], self.coefficients = 0.0, None

    def solve(self) -> bool:
        """Fit the coefficients to what was observed; whether there was anything."""
        tokens = self.moments[0, 0]
        if not tokens > 0:
            return False
        mean, rows = self.moments[0, 1 : 1 + DIM] / tokens, self.moments[0, 1 + DIM :] / tokens
        spread = self.moments[1:, 1 : 1 + DIM] / tokens - np.outer(mean, mean)
        together = self.moments[1:, 1 + DIM :] / tokens - np.outer(mean, rows)
        ridge = max(_RIDGE * float(np.trace(spread)) / DIM, 1.0)
        slope = np.linalg.solve(spread + ridge * np.eye(DIM), together)
        slope = np.clip(np.rint(slope * _ONE), -_LARGEST, _LARGEST)
        constant = np.rint(rows * _ONE - mean @ slope)
        self.coefficients = np.concatenate([constant[None], slope]).astype(np.int64)
        return True

    def predict(self, features: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """int64 [S, N] >= 0: expected rows. The same integers on every processor. Raises ValueError before `solve`."""
        if self.coefficients is None:
            raise ValueError("a predictor must be fitted before it predicts")
        constant, slope = self.coefficients[0], self.coefficients[1:].astype(np.float64)
        per_token = (features.astype(np.float64) @ slope).astype(np.int64) + constant
        per_token = np.clip(per_token, 0, _MOST_PER_TOKEN)
        return (per_token * lengths.astype(np.int64)[:, None] + _ONE // 2) // _ONE

    def state(self) -> dict[str, Tensor]:
        """What `load` needs to go on to the bit."""
        found = {} if self.coefficients is None else {"coefficients": torch.from_numpy(self.coefficients.copy())}
        return {"moments": torch.from_numpy(self.moments.copy()), **found}

    def load(self, state: dict[str, Tensor]) -> bool:
        """Take a state up; False, and as new, where it is of another number of ranks or of other features."""
        fresh = RowPredictor(self.num_ranks)
        fits = "moments" in state and tuple(state["moments"].shape) == fresh.moments.shape
        if fits:
            fresh.moments = state["moments"].cpu().numpy().astype(np.float64)
            if "coefficients" in state:
                fresh.coefficients = state["coefficients"].cpu().numpy().astype(np.int64)
        self.moments, self.coefficients = fresh.moments, fresh.coefficients
        return fits
