"""Series of a run made fit for drawing: fewer points, less noise, the right unit of time."""

import numpy as np

from luffy.report.runs import Run, column, warmup_steps

MAX_POINTS = 400


def bin_means(values: np.ndarray, max_bins: int = MAX_POINTS) -> np.ndarray:
    """Means over at most `max_bins` runs of neighbours along axis 0; NaN counts for nothing."""
    count = len(values)
    if count <= max_bins:
        return values
    edges = np.linspace(0, count, max_bins + 1).astype(int)[:-1]
    known = np.isfinite(values)
    sums = np.add.reduceat(np.where(known, values, 0.0), edges, axis=0)
    counts = np.add.reduceat(known.astype(float), edges, axis=0)
    return np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)


def smooth(values: np.ndarray, sigma: float) -> np.ndarray:
    """A Gaussian mean centred on each point, over what is known of it.

    Centred, because a trailing mean lags: on a falling loss it would stand above every point it sums up. At
    the ends the window is cut rather than filled with copies.
    """
    if sigma <= 0 or len(values) < 3:
        return values
    # The kernel may not outgrow the series, or "same" would return the kernel's length.
    reach = min(int(np.ceil(3 * sigma)), (len(values) - 1) // 2)
    kernel = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2)
    known = np.isfinite(values)
    sums = np.convolve(np.where(known, values, 0.0), kernel, mode="same")
    weights = np.convolve(known.astype(float), kernel, mode="same")
    return np.divide(sums, weights, out=np.full(len(values), np.nan), where=weights > 0)


def mean_of_last(values: np.ndarray, share: float = 1 / 30) -> float:
    """The mean of the last few finite values: one step's loss is mostly noise."""
    known = values[np.isfinite(values)]
    return float(known[-max(1, round(len(known) * share)) :].mean()) if known.size else float("nan")


def elapsed_time(seconds: np.ndarray) -> tuple[np.ndarray, str]:
    """Cumulative training time, in the unit that keeps its numbers small, and that unit's name."""
    elapsed = np.nancumsum(seconds)
    if elapsed[-1] < 180:
        return elapsed, "s"
    if elapsed[-1] < 3 * 3600:
        return elapsed / 60, "min"
    return elapsed / 3600, "h"


def step_means(run: Run, key: str, kinds: tuple[str, ...]) -> dict[str, float]:
    """Means a step of every kind of `key` ("bytes", "seconds_split") that occurred; warm-up left out of times alone."""
    skip = 0 if key.startswith("bytes") else warmup_steps(len(run.records))
    columns = {kind: column(run.records, key, kind)[skip:] for kind in kinds}
    return {kind: float(np.nanmean(values)) for kind, values in columns.items() if np.nansum(values) > 0}


def expert_load(run: Run) -> np.ndarray | None:
    """[layers, experts]: load over the layer's mean, over the last tenth of the records that have it."""
    tables = [record["expert_load"] for record in run.records if record.get("expert_load")]
    if not tables:
        return None
    tables = [table for table in tables[-max(1, len(tables) // 10) :] if len(table) == len(tables[-1])]
    width = max(len(row) for table in tables for row in table)
    total = np.full((len(tables[-1]), width), np.nan)  # NaN stays where a layer has fewer experts
    for table in tables:
        for layer, row in enumerate(table):
            counts = np.array([0.0 if value is None else value for value in row])
            total[layer, : len(row)] = np.nan_to_num(total[layer, : len(row)]) + counts
    experts = np.isfinite(total).sum(axis=1, keepdims=True)
    mean = np.nansum(total, axis=1, keepdims=True) / np.maximum(experts, 1)
    load = total / np.where(mean > 0, mean, np.nan)
    return load if np.isfinite(load).any() else None
