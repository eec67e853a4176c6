"""One page that compares recipes: loss against time and bytes, step time by phase, who sends to whom, ratios.

It is made of `compare.json` and of the runs that this names, so it can be written again at any time (`luffy report`).
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from luffy.errors import UserError
from luffy.report import compare_figures as figures
from luffy.report import compare_structure as structure
from luffy.report import compare_table as tables
from luffy.report.html import origin, render
from luffy.report.runs import REPORT_FILE, read_run, write_bytes_atomic
from luffy.report.style import draw_if_any
from luffy.report.verdict import verdicts

COMPARE_FILE = "compare.json"


def read_compare(folder: Path) -> list[dict[str, Any]]:
    """The summaries of a finished comparison."""
    path = folder / COMPARE_FILE
    try:
        summaries = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"--out: {path} cannot be read ({error}); run luffy compare again") from error
    if not isinstance(summaries, list) or not all(isinstance(s, dict) and "folders" in s for s in summaries):
        raise UserError(f"--out: {path} does not hold a comparison; run luffy compare again")
    return summaries


def write_compare_report(folder: Path) -> Path:
    """Write `report.html` for the comparison in `folder`; the page's path."""
    summaries = read_compare(folder)
    runs = [[read_run(folder / name) for name in s["folders"]] for s in summaries]  # an absolute name stays itself
    bounded = any(s.get("roofline") for s in summaries)  # links whose rates are known
    plots: list[tuple[str, Callable[[], Figure | None]]] = [
        (
            "Loss against the time spent in training steps, evaluation not counted. Held-out: median of repeats.",
            lambda: figures.loss_figure(summaries, runs, "time"),
        ),
        (
            "The same losses against the bytes that left a rank by then, all ranks together.",
            lambda: figures.loss_figure(summaries, runs, "bytes"),
        ),
        (
            "Mean step after warm-up by phase."
            + (" With these bytes on these links no step is shorter than its roofline." if bounded else ""),
            lambda: figures.phases_figure(summaries),
        ),
        ("Bytes of a mean step by what they carry.", lambda: figures.bytes_figure(summaries)),
        ("Bytes of a mean step by the class of link.", lambda: figures.links_figure(summaries)),
        (
            "Bytes from each rank (row) to each other (column): the first recipe, then the others in the same scale.",
            lambda: structure.matrices_figure(summaries),
        ),
        (
            "Share of a sequence's rows that its favourite rank serves: what is not there must travel.",
            lambda: structure.share_figure(summaries, runs),
        ),
        ("Copies sent, of those that would be without condensation.", lambda: structure.kept_figure(summaries)),
    ]
    pictures = [{"caption": caption, "svg": drawn[1]} for caption, build in plots if (drawn := draw_if_any(build))]
    first = summaries[0]
    sections = [
        (
            "Speed",
            tables.speed_table(summaries),
            "Median step after warm-up." + (" Reached: roofline over the mean step." if bounded else ""),
        ),
        ("Phases of a step", tables.phase_table(summaries), "Mean step after warm-up; the parts add up to it."),
        (
            "Traffic",
            tables.traffic_table(summaries),
            "Mean step, all ranks together; only what leaves a rank. Moved: share of sequences that change rank "
            "behind a layer. Exposed: planning that a step had to wait for, at most.",
        ),
        (
            "Quality",
            tables.quality_table(summaries),
            "Held-out loss in nats per token. Time and bytes run until a loss is reached: --target-loss, or else "
            "the first recipe's last one plus 0.01. Between evaluations they lie on a straight line.",
        ),
    ]
    if len(summaries) > 2:
        sections.append(("Every pair", tables.ratio_table(summaries), "Step time of the column over that of the row."))
    html = render(
        "compare.html.j2",
        title=(", ".join(map(tables.name_of, summaries)) if len(summaries) < 4 else f"{len(summaries)} recipes")
        + f" on {first['model']}",
        origin=origin(runs[0][0]),
        verdicts=verdicts(summaries),
        sections=[(title, head, rows, note) for title, (head, rows), note in sections],
        remarks=tables.remarks(summaries),
        pictures=pictures,
        own_options=[(s["label"], s["own_options"]) for s in summaries if s.get("own_options")],
        elsewhere=[(tables.name_of(s), s["differs"]) for s in summaries if s.get("elsewhere")],
    )
    page = folder / REPORT_FILE
    write_bytes_atomic(page, html.encode())
    return page
