"""How near routers stay to the seats of their sequences, over a run."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luffy.report import style
from luffy.report.runs import Run, column
from luffy.report.series import bin_means, smooth


def topics_figure(run: Run) -> Figure | None:
    """Left: rows of a token that leave its topic's experts, by MoE layer. Right: what is left of the busiest
    rank's rows, and how evenly experts are used. None for runs without topics."""
    mean = column(run.records, "topics", "rows_away")
    if not np.isfinite(mean).any():
        return None
    figure = Figure(figsize=(style.WIDTH, 3.7), layout="constrained")
    rows, loads = figure.subplots(1, 2, width_ratios=(3, 2))
    by_layer = [(r["step"], [layer["rows_away"] for layer in r["topics_by_layer"]])
                for r in run.records if r.get("topics_by_layer")]  # fmt: skip
    for layer in range(len(by_layer[0][1]) if by_layer else 0):
        shade = style.shade((layer + 0.5) / len(by_layer[0][1]))
        rows.plot([s for s, _ in by_layer], [away[layer] for _, away in by_layer], color=shade, linewidth=1.0,
                  label=f"layer {layer + 1}")  # fmt: skip
    steps = bin_means(run.steps)
    window = max(1.0, len(steps) / 60)
    rows.plot(steps, smooth(bin_means(mean), window), color=style.INK, linewidth=2.0, label="mean")
    touched = bin_means(column(run.records, "topics", "blocks_touched"))
    rows.plot(steps, smooth(touched, window), color=style.INK, linewidth=1.2, linestyle=":", label="ranks it uses")
    rows.set_ylabel("rows a token")
    for name, values, line in (
        ("busiest rank, over the mean as dealt", column(run.records, "topics", "busiest"), "-"),
        ("balance of experts", column(run.records, "balance"), "--"),
    ):
        loads.plot(steps, smooth(bin_means(values), window), color=style.INK, linestyle=line, linewidth=1.4, label=name)
    for panel in (rows, loads):
        panel.set_ylim(0, None)
        panel.set_xlabel("step")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=5))
        panel.grid(axis="y")
        panel.legend(frameon=False, fontsize=7.5)
    last = float(mean[np.isfinite(mean)][-1])
    figure.suptitle(f"Rows that leave their topic's experts: {last:.2f} a token at the end", x=0.01, ha="left",
                    fontsize=11.5, fontweight="bold", color=style.INK)  # fmt: skip
    return figure
