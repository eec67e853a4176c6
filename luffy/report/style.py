"""How every figure looks, and how a figure becomes a file or a part of a page.

Figures are built with matplotlib's objects alone: no `pyplot`, hence no global list of open figures, no
backend to choose and nothing to close. Settings hold inside one `with` and leave the caller's own untouched.

Three choices behind the looks. A figure is drawn at the width of a phone (4.4 inches, 10-point text), and a
page scales it up rather than down, so that it stays readable where it is smallest. Colours are those of Okabe
and Ito, told apart with any kind of colour vision; a backward pass wears the pale shade of its forward pass,
so that a pair reads as a pair even in grey. Legends and subtitles carry the numbers, so that a slide needs no
table beside the figure.
"""

import base64
import contextlib
import io
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import matplotlib as mpl
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import FuncFormatter

from luffy.report.runs import write_bytes_atomic

INK, MUTED, GRID = "#1f2933", "#52606d", "#e4e7eb"
BLUE, ORANGE, GREEN, PURPLE, SKY, RED, YELLOW = (
    "#0072b2",
    "#e69f00",
    "#009e73",
    "#cc79a7",
    "#56b4e9",
    "#d55e00",
    "#f0e442",
)
PALE_BLUE, PALE_ORANGE, GREY = "#8cc4e8", "#f7d999", "#9aa5b1"

BYTE_COLOURS = {
    "dispatch": BLUE,
    "dispatch_backward": PALE_BLUE,
    "combine": ORANGE,
    "combine_backward": PALE_ORANGE,
    "experts": GREEN,
    "gradients": PURPLE,
    "control": GREY,
}
SECONDS_COLOURS = {
    "attention": BLUE,
    "experts": GREEN,
    "exchange": ORANGE,
    "plan": PURPLE,
    "condense": RED,
    "gradients": SKY,
    "other": GREY,
}
LINK_COLOURS = {"local": GREY, "intra_node": SKY, "inter_node": RED}

_LABELS = {
    "dispatch_backward": "dispatch, backward",
    "combine_backward": "combine, backward",
    "gradients": "gradient sync",
    "local": "stays in its rank",
    "intra_node": "within a node",
    "inter_node": "between nodes",
}

WIDTH = 4.4
HEIGHT = 3.1
_PNG_DPI = 220
_SETTINGS: dict[str, Any] = {
    "font.family": "sans-serif",
    "font.sans-serif": ["DejaVu Sans"],
    "font.size": 10,
    "axes.titlesize": 11.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.titlepad": 9,
    "axes.titlecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 10,
    "axes.edgecolor": MUTED,
    "axes.linewidth": 0.8,
    "axes.grid": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": GRID,
    "grid.linewidth": 0.8,
    "text.color": INK,
    "legend.frameon": False,
    "legend.fontsize": 9,
    "legend.handlelength": 1.2,
    "legend.handletextpad": 0.5,
    "legend.columnspacing": 1.4,
    "lines.solid_capstyle": "round",
    "figure.facecolor": "white",
    "savefig.facecolor": "white",
    "svg.fonttype": "path",  # the same letters everywhere, whatever fonts the reader has
    "svg.hashsalt": "luffy",  # the same run gives the same bytes
}


def label_of(kind: str) -> str:
    """How a person calls a kind of bytes, seconds or link."""
    return _LABELS.get(kind, kind.replace("_", " "))


def settings() -> contextlib.AbstractContextManager[None]:
    """A context in which figures are made and saved."""
    return mpl.rc_context(cast(Any, _SETTINGS))


def new_figure(height: float = HEIGHT, width: float = WIDTH) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout=ConstrainedLayoutEngine(h_pad=0.07, w_pad=0.09))
    return figure, figure.subplots()


def draw_if_any(build: Callable[[], Figure | None]) -> tuple[bytes, bytes] | None:
    """Run `build` under the project's settings; its figure as (PNG, SVG), or None if it had nothing to draw."""
    with settings():
        figure = build()
        if figure is None:
            return None
        png, svg = io.BytesIO(), io.BytesIO()
        figure.savefig(png, format="png", dpi=_PNG_DPI, metadata={"Software": None})
        figure.savefig(svg, format="svg", metadata={"Date": None, "Creator": None})
    return png.getvalue(), svg.getvalue()


def draw(build: Callable[[], Figure]) -> tuple[bytes, bytes]:
    """`draw_if_any` for a figure that there always is."""
    drawn = draw_if_any(build)
    assert drawn is not None
    return drawn


def save_png(path: Path, png: bytes) -> Path:
    write_bytes_atomic(path, png)
    return path


def data_uri(svg: bytes) -> str:
    """An SVG as an image's `src`: nothing is fetched, and several on a page cannot collide in their ids."""
    return "data:image/svg+xml;base64," + base64.b64encode(svg).decode("ascii")


def tick_format(axis: Any, formatter: Callable[[float], str]) -> None:
    """Label an axis with one of the formats of `units`, less trailing zeros: ticks are round numbers."""

    def label(value: float, _position: int) -> str:
        return re.sub(r"\.0+(?!\d)|(\.\d*[1-9])0+(?!\d)", r"\1", formatter(value))

    axis.set_major_formatter(FuncFormatter(label))


def titles(axes: Axes, title: str, subtitle: str = "") -> None:
    """A bold title and, under it, one quiet line with the number to remember."""
    axes.set_title(title, pad=22 if subtitle else 9)
    if subtitle:
        axes.annotate(
            subtitle,
            (0, 1),
            (0, 6),
            xycoords="axes fraction",
            textcoords="offset points",
            color=MUTED,
            fontsize=9,
            in_layout=False,  # a long line may pass over a colour bar; it must not narrow the plot
        )


def legend_below(axes: Axes, columns: int) -> None:
    """A legend under the axes: it hides no data and does not squeeze the plot sideways on a phone."""
    handles, labels = axes.get_legend_handles_labels()
    cast(Figure, axes.figure).legend(handles, labels, loc="outside lower left", ncols=columns)


def shade(position: float) -> tuple[float, float, float, float]:
    """A colour of one sequential scale, 0 dark to 1 light: for many lines that have an order."""
    return mpl.colormaps["viridis"](0.9 * position)
