"""The pictures of a training run, each as a PNG for a slide and as an SVG for a page.

A picture appears only when the run recorded what it shows: no empty axes, no zeros in place of what nobody
measured. Long runs are drawn from means over neighbouring steps, so that a million steps make a figure of the
same size as a hundred.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luffy.report import style
from luffy.report.breakdown import expert_load_figure, links_figure, time_split_figure
from luffy.report.compare_structure import matrices_figure, matrix_of
from luffy.report.locality import topics_figure
from luffy.report.runs import LINK_KINDS, PICTURES, SECONDS_KINDS, Run, column, warmup_steps
from luffy.report.series import bin_means, elapsed_time, expert_load, mean_of_last, smooth, step_means
from luffy.report.units import format_bytes, format_count, format_loss, format_share

_BARS_UP_TO = 24  # steps shown as separate bars before they merge into areas
_FEW = 50  # steps shown point by point, unsmoothed
_ZOOM_FROM = 300  # steps from which the first fall of the loss is left to run off the scale


@dataclass(frozen=True)
class Picture:
    """A drawn figure: `name` is its file's stem, `caption` says in words what it shows."""

    name: str
    caption: str
    png: bytes
    svg: bytes


def _step_axis(axes: Axes, steps: np.ndarray) -> None:
    axes.set_xlabel("step")
    if len(steps) == 1:
        axes.set_xticks(steps)
        axes.set_xlim(steps[0] - 2, steps[0] + 2)
    else:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=6))


def _noisy_line(axes: Axes, x: np.ndarray, y: np.ndarray, colour: str, label: str) -> None:
    """Every step faintly and their smoothed course on top; a handful of steps is shown as it is."""
    x, y = bin_means(x), bin_means(y)
    if len(y) < _FEW:
        axes.plot(x, y, color=colour, linewidth=1.8, marker="o", markersize=4, label=label)
    else:
        axes.plot(x, y, color=colour, linewidth=0.9, alpha=0.35)
        axes.plot(x, smooth(y, max(2.0, len(y) / 80)), color=colour, linewidth=2.0, label=f"{label}, smoothed")
    if len(x) > 1:
        margin = 0.015 * float(np.ptp(x))
        axes.set_xlim(float(x.min()) - margin, float(x.max()) + margin)


def loss_figure(run: Run, against: str) -> Figure:
    """Training and validation loss against `"steps"` or `"time"`."""
    loss, valid = column(run.records, "loss"), column(run.records, "valid_loss")
    figure, axes = style.new_figure()
    x = run.steps
    if against == "time":
        x, unit = elapsed_time(column(run.records, "seconds"))
        axes.set_xlabel(f"training time ({unit})")
    _noisy_line(axes, x, loss, style.BLUE, "train")
    facts = [f"training, last steps {format_loss(mean_of_last(loss))}"]
    if not np.isfinite(loss).any():
        facts = ["no finite loss was recorded"]
    measured = np.flatnonzero(np.isfinite(valid))
    if measured.size:
        marks = np.unique(np.linspace(0, measured.size - 1, min(measured.size, 20)).astype(int)).tolist()
        axes.plot(
            x[measured],
            valid[measured],
            color=style.RED,
            linewidth=1.3,
            marker="D",
            markersize=4.5,
            markevery=marks,
            label="held-out",
        )
        facts.append(f"held-out {format_loss(valid[measured[-1]])}")
    first = len(loss) // 50
    seen = np.concatenate([bin_means(loss[first:]), valid[first:]])
    if len(loss) >= _ZOOM_FROM and np.isfinite(seen).any():
        low, high = float(np.nanmin(seen)), float(np.nanmax(seen))
        axes.set_ylim(low - 0.05 * (high - low), high + 0.05 * (high - low))
    if against == "steps":
        _step_axis(axes, x)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y")
    style.titles(axes, f"Loss against {against}", "at the end: " + ", ".join(facts))
    style.legend_below(axes, columns=2)
    return figure


def speed_figure(run: Run) -> Figure:
    """Tokens per second, step by step."""
    seconds = column(run.records, "seconds")
    rate = column(run.records, "tokens") / np.where(seconds > 0, seconds, np.nan)
    figure, axes = style.new_figure()
    _noisy_line(axes, run.steps, rate, style.GREEN, "tokens/s")
    axes.set_ylim(bottom=0)
    style.tick_format(axes.yaxis, format_count)
    _step_axis(axes, run.steps)
    axes.set_ylabel("tokens per second")
    axes.grid(axis="y")
    median = float(np.nanmedian(rate[warmup_steps(len(rate)) :]))
    style.titles(axes, "Speed", f"median: {format_count(median)} tokens/s, all ranks together")
    return figure


def bytes_figure(run: Run) -> Figure:
    """Bytes that left a rank in each step, stacked by direction."""
    table = {kind: np.nan_to_num(column(run.records, "bytes", kind)) for kind in style.BYTE_COLOURS}
    table = {kind: values for kind, values in table.items() if values.sum() > 0}
    total = sum(float(values.mean()) for values in table.values())
    labels = [f"{style.label_of(kind)}: {format_share(float(values.mean()), total)}" for kind, values in table.items()]
    colours = [style.BYTE_COLOURS[kind] for kind in table]
    figure, axes = style.new_figure(height=3.7)
    if len(run.records) <= _BARS_UP_TO:
        base = np.zeros(len(run.records))
        for values, colour, label in zip(table.values(), colours, labels, strict=True):
            axes.bar(run.steps, values, 0.8, bottom=base, color=colour, label=label, linewidth=0)
            base += values
    else:
        x = bin_means(run.steps)
        layers = [bin_means(values) for values in table.values()]
        axes.stackplot(x, *layers, colors=colours, labels=labels, linewidth=0)
        axes.set_xlim(x[0], x[-1])
    axes.set_ylim(bottom=0)
    style.tick_format(axes.yaxis, format_bytes)
    _step_axis(axes, run.steps)
    axes.set_ylabel("bytes per step")
    axes.grid(axis="y")
    style.titles(axes, "Bytes that leave a rank", f"mean: {format_bytes(total)} a step, all ranks together")
    style.legend_below(axes, columns=2)
    return figure


def condensation_figure(run: Run, layers: list[str]) -> Figure:
    """Share of copies that were sent in each step, by MoE layer."""
    figure, axes = style.new_figure(height=3.7)
    for i, layer in enumerate(layers):
        kept = column(run.records, "condense", layer, "kept")
        kept = np.where(np.isfinite(kept), kept, column(run.records, "condense", "kept"))  # steps without: all are sent
        shade = (i + 0.5) / len(layers)
        axes.plot(bin_means(run.steps), bin_means(kept), color=style.shade(shade), linewidth=1.4,
                  label=layer.replace("_", " "))  # fmt: skip
    axes.set_ylim(0, 1.03)
    _step_axis(axes, run.steps)
    axes.set_ylabel("share of copies sent")
    axes.grid(axis="y")
    whole = float(np.nanmean(column(run.records, "condense", "kept")))
    style.titles(axes, "What condensation leaves", f"mean of all layers and steps: {whole:.0%} of the copies sent")
    style.legend_below(axes, columns=4)
    return figure


def draw_pictures(run: Run) -> list[Picture]:
    """Every picture that the run's records can fill, in the order in which a reader wants them."""
    plans: list[tuple[str, str, Callable[[], Figure | None]]] = []

    def add(name: str, caption: str, build: Callable[[], Figure | None]) -> None:
        assert name in PICTURES, name  # `--overwrite` removes these
        plans.append((name, caption, build))

    caption = "Loss of every step (faint), smoothed over neighbouring steps, and on validation data."
    add("loss", caption, partial(loss_figure, run, "steps"))
    timed = len(run.records) > 1 and np.nansum(column(run.records, "seconds")) > 0
    if timed:
        caption = "The same losses against the time spent in training steps; validation is not counted."
        add("loss_by_time", caption, partial(loss_figure, run, "time"))
    if any(np.nansum(column(run.records, "bytes", kind)) > 0 for kind in style.BYTE_COLOURS):
        caption = "Bytes that left a rank in each step, by direction, summed over ranks."
        add("bytes", caption, partial(bytes_figure, run))
    if layers := sorted({k for r in run.records for k in r.get("condense", ()) if k.startswith("layer_")}):
        caption = "Copies sent, of those that would be without condensation, by MoE layer."
        add("condensation", caption, partial(condensation_figure, run, layers))
    if len(means := step_means(run, "bytes_by_link", LINK_KINDS)) > 1:  # one bar alone tells nothing
        add("links", "Bytes of a mean step by the kind of link that they took.", partial(links_figure, means))
    about = [{"label": str(run.lookup("recipe") or "this run"), **run.summary}]
    if matrix_of(about[0]) is not None:
        caption = "Bytes of rows and experts from each rank (row) to each other (column)."
        add("traffic", caption, partial(matrices_figure, about))
    if means := step_means(run, "seconds_split", SECONDS_KINDS):
        add("time_split", "Time of a mean step by stage.", partial(time_split_figure, run, means))
    if timed:
        add("speed", "Tokens trained per second, in each step.", partial(speed_figure, run))
    if any("topics" in r for r in run.records):
        caption = "Rows of a token that leave the experts of its sequence's topic, by MoE layer: each topic a rank."
        add("topics", caption, partial(topics_figure, run))
    if (load := expert_load(run)) is not None:
        caption = "Tokens that each expert received, relative to an even share, late in the run."
        add("expert_load", caption, partial(expert_load_figure, load))
    return [Picture(name, caption, *drawn) for name, caption, build in plans if (drawn := style.draw_if_any(build))]


def write_pictures(run: Run, out_dir: Path) -> list[Picture]:
    """Draw every picture and save it as `out_dir/NAME.png`."""
    pictures = draw_pictures(run)
    for picture in pictures:
        style.save_png(out_dir / f"{picture.name}.png", picture.png)
    return pictures
