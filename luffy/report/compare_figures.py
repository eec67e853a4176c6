"""The pictures of a comparison. Each returns None when no run recorded what it would show.

Names stand above their bars and not beside them: a recipe with options has a long name, and on a phone a margin for it
would leave no room for the bar. A recipe keeps its colour through all pictures.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import MaxNLocator

from luffy.report import style
from luffy.report.compare_table import bound_of, name_of, total_bytes
from luffy.report.runs import BYTE_KINDS, SECONDS_KINDS, Run, column
from luffy.report.series import bin_means, elapsed_time, smooth
from luffy.report.summaries import cumulative, phases_known
from luffy.report.units import format_bytes, format_seconds

COLOURS = (style.BLUE, style.RED, style.GREEN, style.PURPLE, style.ORANGE, style.SKY, "#000000", style.GREY)
DASHES = ("-", "--", ":")
LONGEST_NAME = 40
Summaries = Sequence[dict[str, Any]]


def short(name: str, most: int = LONGEST_NAME) -> str:
    """At most `most` letters of a label; of a long one rather its options, which tell it from its neighbours."""
    if len(name) > most and " --" in name:
        name = "…" + name[name.index(" --") + 1 :]
    return name if len(name) <= most else name[: most - 1] + "…"


def look(index: int) -> dict[str, Any]:
    """Colour and dashes of recipe `index`: told apart up to 24 of them."""
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": DASHES[index // len(COLOURS) % len(DASHES)]}


def legend(axes: Axes, names: Sequence[str]) -> None:
    """Under the axes, in as many columns as the names leave room for."""
    style.legend_below(axes, columns=1 if max(map(len, names)) > 22 else 2)


def loss_figure(summaries: Summaries, runs: Sequence[Sequence[Run]], against: str) -> Figure:
    """Held-out loss (marks) over training loss (faint) against `"time"` or `"bytes"`."""
    figure, axes = style.new_figure(height=3.0 + 0.16 * len(summaries))
    longest = max((column(repeats[0].records, "seconds") for repeats in runs), key=np.nansum)
    _, unit = elapsed_time(longest)
    scale = {"s": 1.0, "min": 60.0, "h": 3600.0}[unit] if against == "time" else 1.0
    shown: list[float] = []
    names = [short(name_of(s)) for s in summaries]
    for i, (summary, repeats, name) in enumerate(zip(summaries, runs, names, strict=True)):
        run = repeats[0]
        x = cumulative(run)[0 if against == "time" else 1] / scale
        loss = column(run.records, "loss")
        curve, few = summary["curve"], len(summary["curve"]["step"]) < 3
        course = smooth(bin_means(loss), max(1.0, min(len(loss), 400) / 60))
        axes.plot(bin_means(x), course, linewidth=1.8 if few else 0.9, alpha=1.0 if few else 0.35, **look(i),
                  label=name if few else None)  # fmt: skip
        if curve["step"]:
            at = np.array(curve["seconds" if against == "time" else "bytes"]) / scale
            axes.plot(at, curve["valid_loss"], marker="o", markersize=3.5, linewidth=1.5, **look(i),
                      label=None if few else name)  # fmt: skip
            shown += curve["valid_loss"]
        shown += course[len(course) // 10 :].tolist()
    target = summaries[0].get("target_loss")
    if not any(len(s["curve"]["step"]) > 1 for s in summaries):
        target = None  # a course of one point crosses nothing
    if target is not None:
        axes.axhline(target, color=style.MUTED, linewidth=0.9, linestyle=(0, (1, 2)))
        shown.append(target)
    known = np.array([x for x in shown if np.isfinite(x)])
    if known.size and np.ptp(known) > 0:
        low, high = known.min(), known.max()
        axes.set_ylim(low - 0.06 * (high - low), high + 0.06 * (high - low))
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    if against == "time":
        axes.set_xlabel(f"training time ({unit})")
    else:
        axes.set_xlabel("bytes that left a rank, all together")
        style.tick_format(axes.xaxis, format_bytes)
    axes.set_ylabel("loss (nats per token)")
    axes.grid(axis="y")
    held = any(s["curve"]["step"] for s in summaries)
    what = "marks: held-out; faint: training" if held else "training loss, smoothed"
    what += f"; dotted: goal, {target:.3f}" if target is not None else ""
    style.titles(axes, f"Loss against {'wall time' if against == 'time' else 'bytes moved'}", what)
    legend(axes, names)
    return figure


def _stack(
    summaries: Summaries,
    parts: Sequence[dict[str, float]],
    colours: dict[str, str],
    numbers: Sequence[str],
    form: Callable[[float], str],
) -> tuple[Figure, Axes]:
    """One stacked bar a recipe: its name and its number above it."""
    count = len(summaries)
    figure, axes = style.new_figure(height=1.55 + 0.5 * count)
    for i, (summary, part, number) in enumerate(zip(summaries, parts, numbers, strict=True)):
        left = 0.0
        for kind, value in part.items():
            axes.barh(i, value, 0.42, left=left, color=colours.get(kind, style.GREY), linewidth=0)
            left += value
        for text, x, side in ((short(name_of(summary), 30), 0.0, "left"), (number, 1.0, "right")):
            axes.annotate(text, (x, i - 0.27), (0, 1), xycoords=("axes fraction", "data"), ha=side, va="bottom",
                          textcoords="offset points", fontsize=8.5, color=style.INK)  # fmt: skip
    axes.set_ylim(count - 0.6, -0.72)
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.set_xlim(0, max(sum(part.values()) for part in parts) * 1.03 or 1)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    style.tick_format(axes.xaxis, form)
    return figure, axes


def _key(axes: Axes, kinds: dict[str, str], columns: int = 3, extra: Sequence[Any] = ()) -> None:
    handles: list[Any] = [Patch(color=colour, label=label) for label, colour in kinds.items()]
    axes.get_figure(root=True).legend(handles=[*handles, *extra], loc="outside lower left", ncols=columns)  # type: ignore[union-attr]


def phases_figure(summaries: Summaries) -> Figure:
    """Mean step by phase, the roofline as a line through each bar, hidden exchange hatched behind it."""
    parts = [{k: v for k in SECONDS_KINDS if (v := s["phase_seconds"].get(k, 0)) > 0} for s in summaries]
    wholes = [sum(part.values()) for part in parts]
    hidden = [s.get("exchange_hidden_seconds") or 0.0 for s in summaries]
    roofs = [s.get("roofline") for s in summaries]
    numbers = [
        format_seconds(whole) + (f", roofline {format_seconds(roof['seconds'])} ({bound_of(roof)})" if roof else "")
        for whole, roof in zip(wholes, roofs, strict=True)
    ]
    colours = style.SECONDS_COLOURS
    figure, axes = _stack(summaries, parts, colours, numbers, format_seconds)
    extra: list[Any] = []
    if any(hidden):
        extra.append(
            axes.barh(range(len(parts)), hidden, 0.42, left=wholes, color="none", edgecolor=style.ORANGE, hatch="////",
                      linewidth=0.8, label="exchange, hidden")
        )  # fmt: skip
    if any(roofs):
        at = [(roof["seconds"], i) for i, roof in enumerate(roofs) if roof]
        extra.append(
            axes.vlines([x for x, _ in at], [i - 0.29 for _, i in at], [i + 0.29 for _, i in at], color=style.INK,
                        linewidth=2.2, label="roofline")
        )  # fmt: skip
    reach = [roof["seconds"] for roof in roofs if roof] + [a + b for a, b in zip(wholes, hidden, strict=True)]
    axes.set_xlim(0, max(reach) * 1.03)
    axes.set_xlabel("mean step")
    present = [k for k in SECONDS_KINDS if any(k in part for part in parts)]
    exposed = {"exchange": "exchange, exposed"} if any(hidden) else {}
    _key(axes, {exposed.get(k, style.label_of(k)): colours[k] for k in present}, extra=extra)
    unknown = [short(name_of(s), 24) for s in summaries if not phases_known(s["phase_seconds"])]
    subtitle = "not split: " + ", ".join(unknown) if unknown else ""
    if any(roofs):
        subtitle = "roofline: max(computation, bytes / measured rate of a link)"
    style.titles(axes, "Where a step's time goes", subtitle)
    return figure


def bytes_figure(summaries: Summaries) -> Figure | None:
    """Bytes of a mean step by direction."""
    parts = [{k: v for k in BYTE_KINDS if (v := s["step_bytes"][k]) > 0} for s in summaries]
    if not any(parts):
        return None
    first = total_bytes(summaries[0])
    numbers = [
        format_bytes(total_bytes(s)) + (f", {first / total_bytes(s):.2f}× fewer" if i and total_bytes(s) else "")
        for i, s in enumerate(summaries)
    ]
    figure, axes = _stack(summaries, parts, style.BYTE_COLOURS, numbers, format_bytes)
    axes.set_xlabel("bytes that leave a rank in a mean step")
    present = [k for k in BYTE_KINDS if any(k in part for part in parts)]
    _key(axes, {style.label_of(k): style.BYTE_COLOURS[k] for k in present}, columns=2)
    style.titles(axes, "What leaves a rank, by direction")
    return figure


def links_figure(summaries: Summaries) -> Figure | None:
    """Bytes of a mean step by class of link; only where there are two."""
    kinds = ("intra_node", "inter_node")
    parts = [{k: v for k in kinds if (v := s["step_bytes_by_link"][k]) > 0} for s in summaries]
    if not all(any(k in part for part in parts) for k in kinds):
        return None
    numbers = [f"{format_bytes(part.get('inter_node', 0))} between nodes" for part in parts]
    figure, axes = _stack(summaries, parts, style.LINK_COLOURS, numbers, format_bytes)
    axes.set_xlabel("bytes that leave a rank in a mean step")
    _key(axes, {style.label_of(k): style.LINK_COLOURS[k] for k in kinds}, columns=2)
    style.titles(axes, "Which links they take")
    return figure
