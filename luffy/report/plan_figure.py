"""The picture of `luffy plan`: bytes by recipe, of the few recipes that matter."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from luffy.plan.prediction import Prediction
from luffy.recipes import RECIPES
from luffy.report.style import LINK_COLOURS, legend_below, new_figure, tick_format, titles
from luffy.report.units import format_bytes, format_seconds

MOST = 6
TALLEST = 1.5  # times the bytes of the first: a bar longer than that would crush the others
ALWAYS = ("vanilla", "vanilla_dedup", "luffy", "luffy_max")


def that_matter(predictions: Sequence[Prediction]) -> list[Prediction]:
    """At most six, the fewest seconds first: those of ALWAYS and the best of the rest, none far off the scale.

    Of the rest, `auto` is left out, which is one of the others, and what condenses, which is counted as if it did not.
    """
    base = next((p for p in predictions if p.recipe == "vanilla"), predictions[0])
    near = [p for p in predictions if sum(p.num_bytes) <= TALLEST * sum(base.num_bytes)]
    known = {name for name, recipe in RECIPES.items() if recipe.condense == "none" and not recipe.auto}
    rest = sorted((p for p in near if p.recipe in known - set(ALWAYS)), key=lambda p: p.exchange_seconds)
    kept = [p for p in near if p.recipe in ALWAYS]
    return sorted([*kept, *rest[: MOST - len(kept)]], key=lambda p: p.exchange_seconds)


def build_figure(predictions: Sequence[Prediction], spec: str) -> Figure:
    """Bytes that leave a rank, by link class, one bar a recipe, its seconds beside it. spec: the topology, in words."""
    shown = that_matter(predictions)
    left_out = [p for p in predictions if p not in shown]
    figure, axes = new_figure(height=1.6 + 0.36 * len(shown))
    names, left = [p.recipe for p in shown], [0.0] * len(shown)
    for i, (link, label) in enumerate((("intra_node", "within nodes"), ("inter_node", "between nodes"))):
        widths = [p.num_bytes[i] for p in shown]
        if any(widths):
            axes.barh(names, widths, left=left, color=LINK_COLOURS[link], label=label)
        left = [a + b for a, b in zip(left, widths, strict=True)]
    beside: dict[str, Any] = {"xytext": (4, 0), "textcoords": "offset points", "va": "center"}
    for y, p in enumerate(shown):
        axes.annotate(format_seconds(p.exchange_seconds), (left[y], y), **beside)
    axes.invert_yaxis()
    axes.margins(x=0.2)
    axes.set_xlim(left=0)
    axes.xaxis.set_major_locator(MaxNLocator(4))
    tick_format(axes.xaxis, format_bytes)
    far = [p for p in left_out if sum(p.num_bytes) > TALLEST * max(left, default=0)]
    not_drawn = "".join(f"\n{p.recipe}: {format_bytes(sum(p.num_bytes))}, not drawn" for p in far[:2])
    axes.set_xlabel(spec.replace(":", ", ", 1).replace(",", ", ").replace(",  ", ", ") + not_drawn, fontsize=8)
    titles(axes, "Bytes that cross in a step", "counted; beside: seconds of busy links, predicted")
    if len(axes.get_legend_handles_labels()[1]) > 1 or any(p.num_bytes[1] for p in shown):
        legend_below(axes, 2)
    return figure
