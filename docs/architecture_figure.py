"""Draws docs/figures/architecture.png: what a step is made of, and what one MoE layer is made of."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from luffy.report import style

TARGET = Path(__file__).parent / "figures" / "architecture.png"


def box(axes: Axes, x: float, y: float, width: float, height: float, title: str, file: str, colour: str) -> None:
    shape = FancyBboxPatch((x, y), width, height, boxstyle="round,pad=0,rounding_size=0.08", linewidth=1.4)
    shape.set(facecolor="white", edgecolor=colour)
    axes.add_patch(shape)
    axes.text(x + width / 2, y + height - 0.22, title, ha="center", va="center", weight="bold", fontsize=9.5)
    axes.text(x + width / 2, y + height - 0.52, file, ha="center", va="center", fontsize=7.5, color=style.MUTED)


def arrow(axes: Axes, start: tuple[float, float], end: tuple[float, float]) -> None:
    kind = {"arrowstyle": "-|>", "mutation_scale": 11, "color": style.MUTED, "linewidth": 1.2}
    axes.add_patch(FancyArrowPatch(start, end, shrinkA=1, shrinkB=1, **kind))


def draw() -> Figure:
    figure = Figure(figsize=(9.2, 5.2))
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(0, 11.6), ylim=(0, 6.5))
    axes.axis("off")

    def row(y: float, colour: str, items: list[tuple[str, str]], x: float = 0.2) -> None:
        width = (11.4 - x) / len(items) - 0.25
        for i, (title, file) in enumerate(items):
            left = x + i * (width + 0.25)
            box(axes, left, y, width, 0.75, title, file, colour)
            if i:
                arrow(axes, (left - 0.25, y + 0.37), (left, y + 0.37))

    axes.text(0.2, 6.2, "A step", weight="bold", fontsize=11)
    row(5.2, style.BLUE, [("seats", "luffy/seats"), ("embedding", "model/transformer.py"), ("blocks", "model/stack.py"),
                          ("head, loss", "model/stack.py"), ("parts after a step", "train/parts")])  # fmt: skip
    axes.text(0.2, 4.6, "One MoE layer: model/moe_layer.py", weight="bold", fontsize=11)
    row(3.6, style.GREEN, [("norm, route", "model/router.py"), ("dispatch", "rows to experts"),
                           ("experts", "model/experts.py"), ("combine", "answers back")])  # fmt: skip
    axes.text(0.2, 3.0, "Its dispatcher, as compose.py puts it together", weight="bold", fontsize=11)
    for i, (title, file) in enumerate([("Condensing", "similar tokens share a row"), ("Hosting", "experts visit ranks"),
                                       ("Rebuilding", "sequences move on")]):  # fmt: skip
        box(axes, 0.2 + 2.45 * i, 1.75, 2.2, 0.75, title, file, style.ORANGE)
        arrow(axes, (1.3 + 2.45 * i, 1.75), (1.3 + 2.45 * i, 1.05))
    box(axes, 0.2, 0.3, 7.1, 0.75, "Direct", "exchange/direct.py: pairs or ranks", style.ORANGE)
    box(axes, 7.9, 0.3, 3.3, 0.75, "Transport", "exchange/wire.py, wire_format.py", style.PURPLE)
    box(axes, 7.9, 1.75, 3.3, 0.75, "collectives", "comm/rows.py", style.PURPLE)
    arrow(axes, (7.3, 0.67), (7.9, 0.67))
    arrow(axes, (9.55, 1.05), (9.55, 1.75))
    return figure


if __name__ == "__main__":
    with style.settings():
        draw().savefig(TARGET, dpi=150)
