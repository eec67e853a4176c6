"""Pictures of why recipes differ: who sends to whom, how few ranks serve a sequence, what condensation leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luffy.report import style
from luffy.report.compare_figures import Summaries, legend, look, short
from luffy.report.compare_table import name_of
from luffy.report.runs import Run, column
from luffy.report.series import bin_means, smooth
from luffy.report.units import format_bytes


def matrix_of(summary: dict[str, Any]) -> np.ndarray | None:
    """[ranks, ranks] bytes of rows and experts in a mean step, from a row's rank to a column's; the diagonal is 0."""
    traffic = summary.get("traffic") or {}
    if not traffic.get("steps") or len(traffic.get("bytes") or ()) < 2:
        return None
    matrix = np.array(traffic["bytes"], dtype=float) / traffic["steps"]
    np.fill_diagonal(matrix, 0)
    return matrix


def matrices_figure(summaries: Summaries) -> Figure | None:
    """Who sends how much to whom: one matrix a recipe, all in the scale of the first."""
    found = [(s, m) for s in summaries if (m := matrix_of(s)) is not None]
    if not found:
        return None
    columns = min(2 if len(found) < 5 else 3, len(found))
    lines = -(-len(found) // columns)
    figure = Figure(figsize=(style.WIDTH, 0.75 + (4.5 / columns if columns > 1 else 3.6) * lines), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    most = max(float(m.max()) for _, m in found) or 1.0
    unit = format_bytes(most).split()[1]
    scale = 1000.0 ** ("B", "kB", "MB", "GB", "TB").index(unit)
    before = float(found[0][1].sum())
    image = None
    for axes in grid.flat[len(found) :]:
        axes.set_visible(False)
    for axes, (s, matrix) in zip(grid.flat, found, strict=False):
        ranks = len(matrix)
        shown = np.ma.masked_where(np.eye(ranks, dtype=bool), matrix)
        image = axes.imshow(shown, cmap="YlGnBu", vmin=0, vmax=most)
        axes.set_facecolor("#eef0f3")
        if ranks * columns <= 16:
            size = 8 if ranks * columns <= 8 else 6
            for a, b in np.argwhere(~np.eye(ranks, dtype=bool)):
                colour = "white" if matrix[a, b] > 0.55 * most else style.INK
                axes.text(b, a, f"{matrix[a, b] / scale:.3g}", ha="center", va="center", fontsize=size, color=colour)
        whole = float(matrix.sum())
        change = f" ({whole / before - 1:+.0%})" if s is not found[0][0] and before else ""
        title = f"{short(name_of(s), 50 // columns)}\n{format_bytes(whole)}{change}"
        axes.set_title(title, fontsize=8.5, pad=4, fontweight="normal")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.tick_params(length=0, labelsize=7.5)
        for spine in axes.spines.values():
            spine.set_visible(False)
    grid[0, 0].set_ylabel("from rank", fontsize=8.5)
    grid[-1, 0].set_xlabel("to rank", fontsize=8.5)
    assert image is not None
    bar = figure.colorbar(image, ax=grid, orientation="horizontal", fraction=0.05, pad=0.02, aspect=40)
    bar.outline.set_visible(False)
    bar.ax.xaxis.set_major_locator(MaxNLocator(nbins=4))
    bar.ax.tick_params(labelsize=8)
    style.tick_format(bar.ax.xaxis, format_bytes)
    figure.suptitle(f"Who sends to whom in a mean step ({unit})", x=0.01, ha="left", fontsize=11.5,
                    fontweight="bold", color=style.INK)  # fmt: skip
    return figure


def share_figure(summaries: Summaries, runs: Sequence[Sequence[Run]]) -> Figure | None:
    """How few ranks serve a sequence: the share of its rows at its favourite rank, over the run."""
    figure, axes = style.new_figure(height=2.9 + 0.16 * len(summaries))
    names, ends = [], []
    for i, (summary, repeats) in enumerate(zip(summaries, runs, strict=True)):
        run = repeats[0]
        share = column(run.records, "locality", "favourite_rank_share")
        if not np.isfinite(share).any():
            continue
        share = smooth(bin_means(share), max(1.0, min(len(share), 400) / 60))
        names.append(f"{short(name_of(summary), 30)}: {share[-1]:.0%} at the end")
        ends.append(share)
        axes.plot(bin_means(run.steps), share, linewidth=1.7, label=names[-1], **look(i))
    if not names:
        return None
    axes.set_ylim(0, max(float(np.nanmax(share)) for share in ends) * 1.15)
    axes.yaxis.set_major_locator(MaxNLocator(nbins=5))
    style.tick_format(axes.yaxis, lambda x: f"{100 * x:.0f} %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))
    axes.set_xlabel("step")
    axes.set_ylabel("share of rows")
    axes.grid(axis="y")
    even = 1 / max(1, int(summaries[0].get("ep_size") or summaries[0].get("world_size") or 1))
    style.titles(axes, "Rows at a sequence's favourite rank", f"mean of layers; {even:.0%} if spread evenly")
    legend(axes, names)
    return figure


def kept_figure(summaries: Summaries) -> Figure | None:
    """Copies that condensation left, by MoE layer; only for recipes that condense."""
    found = [(i, s) for i, s in enumerate(summaries) if s.get("kept_by_layer")]
    if not found:
        return None
    figure, axes = style.new_figure(height=2.9 + 0.16 * len(found))
    names = []
    for i, s in found:
        kept = s["kept_by_layer"]
        names.append(f"{short(name_of(s), 30)}: {np.mean(kept):.0%}")
        axes.plot(range(len(kept)), kept, marker="o", markersize=4.5, linewidth=1.6, label=names[-1], **look(i))
    axes.set_ylim(0, 1.04)
    style.tick_format(axes.yaxis, lambda x: f"{100 * x:.0f} %")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10, min_n_ticks=1))
    axes.set_xlabel("MoE layer")
    axes.set_ylabel("copies sent")
    axes.grid(axis="y")
    style.titles(axes, "Kept rows by layer", "share of copies sent, mean of the condensed steps")
    legend(axes, names)
    return figure
