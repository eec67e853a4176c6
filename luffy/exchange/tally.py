"""Rows between ranks, as layers tell each other before they send: counted on the host, at no cost to the device."""

from __future__ import annotations

import numpy as np


class RowTally:
    """int64 [N, N] by MoE layer: rows from each rank to each rank of the EP group, own rows on the diagonal.

    One for all layers of a model. Layers that fetch all their experts tell nobody anything, and are not counted.
    """

    def __init__(self) -> None:
        self._rows: dict[int, np.ndarray] = {}

    def note(self, layer: int, rows: np.ndarray) -> None:
        """rows [N, N] of one micro-batch, forward."""
        self._rows[layer] = self._rows.get(layer, 0) + rows

    def take(self) -> dict[int, np.ndarray]:
        """What was noted since the last call, by layer."""
        out, self._rows = self._rows, {}
        return out


def rows_at_home(rows: dict[int, np.ndarray]) -> list[float]:
    """Share of each layer's rows that stay on their rank."""
    return [float(np.trace(r) / max(1, r.sum())) for _, r in sorted(rows.items())]


def busiest_over_mean(rows: dict[int, np.ndarray]) -> float:
    """Rows of the busiest rank of each exchange, the larger of in and out, over the mean, both summed over layers."""
    away = [r - np.diag(np.diag(r)) for _, r in sorted(rows.items())]
    busiest = sum(int(max(a.sum(0).max(), a.sum(1).max())) for a in away)
    mean = sum(float(a.sum()) / len(a) for a in away)
    return busiest / mean if mean else 1.0
