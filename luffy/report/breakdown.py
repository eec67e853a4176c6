"""Pictures of what a mean step consists of: its time by stage, its bytes by link, its tokens by expert."""

from collections.abc import Callable, Mapping

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, MaxNLocator, NullLocator

from luffy.report import style
from luffy.report.runs import Run, column, warmup_steps
from luffy.report.units import format_bytes, format_seconds, format_share


def _bars(
    means: Mapping[str, float],
    colours: Mapping[str, str],
    whole: float,
    formatter: Callable[[float], str],
    x_label: str,
) -> tuple[Figure, Axes]:
    """One horizontal bar a kind, each with its value and its share of `whole` beside it."""
    figure, axes = style.new_figure(height=1.5 + 0.34 * len(means))
    positions = np.arange(len(means))
    axes.barh(positions, list(means.values()), 0.66, color=[colours[kind] for kind in means])
    for position, (kind, value) in enumerate(means.items()):
        axes.annotate(
            f"{formatter(value)}  ({format_share(value, whole)})" if kind != "local" else formatter(value),
            (value, float(position)),
            (5, 0),
            textcoords="offset points",
            va="center",
            fontsize=9,
        )
    axes.set_yticks(positions, [style.label_of(kind) for kind in means])
    axes.tick_params(axis="y", length=0)
    axes.invert_yaxis()
    axes.set_xlim(0, max([*means.values(), 1e-12]) * 1.5)  # room for the numbers
    axes.xaxis.set_major_locator(MaxNLocator(nbins=4))
    style.tick_format(axes.xaxis, formatter)
    axes.set_xlabel(x_label)
    axes.grid(axis="x")
    return figure, axes


def time_split_figure(run: Run, means: Mapping[str, float]) -> Figure:
    """Where a step's time goes."""
    skip = warmup_steps(len(run.records))
    whole = float(np.nanmean(column(run.records, "seconds")[skip:]))
    rest = max(0.0, whole - sum(means.values()))  # what no stage claims, so that the parts add up to the whole
    means = {**means, "other": means.get("other", 0.0) + rest}
    figure, axes = _bars(means, style.SECONDS_COLOURS, whole, format_seconds, "time per step")
    num_steps = len(run.records) - skip
    span = f"mean of {num_steps} steps after warm-up" if skip else f"mean of {num_steps}, first included"
    style.titles(axes, "Where a step's time goes", f"{format_seconds(whole)} a step ({span})")
    return figure


def links_figure(means: Mapping[str, float]) -> Figure:
    """Which links the bytes took. What stays in its rank is shown, but is no part of the total."""
    whole = sum(value for kind, value in means.items() if kind != "local")
    figure, axes = _bars(means, style.LINK_COLOURS, whole, format_bytes, "bytes per step, all ranks together")
    style.titles(axes, "Which links the bytes took", f"{format_bytes(whole)} a step leave their rank")
    return figure


def expert_load_figure(load: np.ndarray) -> Figure:
    """A heatmap, layers by experts: white is an even share, red too much, blue too little."""
    num_layers, num_experts = load.shape
    figure, axes = style.new_figure(height=float(np.clip(2.0 + 0.2 * num_layers, 2.9, 6.0)))
    most = float(np.clip(np.nanmax(load), 2.0, 8.0))  # never a narrower scale: noise should look like noise
    image = axes.imshow(np.clip(load, 1 / most, most), aspect="auto", cmap="RdBu_r", norm=LogNorm(1 / most, most))
    axes.set_xticks(np.arange(-0.5, num_experts), minor=True)
    axes.set_yticks(np.arange(-0.5, num_layers), minor=True)
    if num_experts <= 32:
        axes.grid(which="minor", color="white", linewidth=1.0)
    axes.tick_params(which="both", length=0)
    for layer, expert in zip(*np.nonzero(load == 0), strict=True):  # idle is more than a shade of blue
        axes.text(expert, layer, "×", color="white", ha="center", va="center", fontsize=9)
    for spine in axes.spines.values():
        spine.set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=9, min_n_ticks=1))
    axes.yaxis.set_major_locator(MaxNLocator(integer=True, nbins=min(12, num_layers), min_n_ticks=1))
    axes.set_xlabel("expert")
    axes.set_ylabel("layer")
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=0.05, aspect=8 * figure.get_figheight())
    shown = most * 1.001  # a tick on the very edge of the scale counts as inside
    bar.ax.yaxis.set_major_locator(
        FixedLocator([tick for tick in (1 / 8, 1 / 4, 1 / 2, 1, 2, 4, 8) if 1 / shown <= tick <= shown])
    )
    bar.ax.yaxis.set_minor_locator(NullLocator())
    style.tick_format(bar.ax.yaxis, lambda value: f"{value:g}×")
    bar.outline.set_visible(False)
    bar.set_label("share, 1× = even")
    layer, expert = np.unravel_index(int(np.nanargmax(load)), load.shape)
    idle = int((load == 0).sum())
    busiest = f"busiest: layer {layer}, expert {expert}, {load[layer, expert]:.2f}× its share"
    style.titles(axes, "Expert load at the end", busiest + (f"; {idle} idle (×)" if idle else ""))
    return figure
