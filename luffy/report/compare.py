"""One page that compares recipes: loss against time and against bytes, step time by stage, traffic, ratios."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from luffy.report.html import REPORT_FILE, origin, render
from luffy.report.runs import SECONDS_KINDS, Run, read_run, write_bytes_atomic
from luffy.report.series import smooth
from luffy.report.style import draw, label_of, new_figure
from luffy.report.units import format_bytes, format_seconds

# Okabe and Ito's palette: told apart by colour-blind readers too.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999999")
TOKEN_DIRECTIONS = ("dispatch", "combine", "dispatch_backward", "combine_backward", "gradients", "control")


def _loss_against(runs: Sequence[Run], what: str) -> Figure:
    figure, axes = new_figure()
    for run, colour in zip(runs, COLOURS * len(runs), strict=False):
        records = run.records
        if what == "seconds":
            x = np.cumsum([r["seconds"] for r in records])
        else:
            x = np.cumsum([sum(r["bytes"].values()) for r in records]) / 1e9
        loss = smooth(np.array([r["loss"] for r in records], dtype=float), max(1.0, len(records) / 60))
        axes.plot(x, loss, color=colour, label=run.summary["recipe"])
    axes.set_xlabel("training time (s)" if what == "seconds" else "bytes that left a rank (GB)")
    axes.set_ylabel("loss (nats per token, smoothed)")
    axes.legend()
    return figure


def _stacked(summaries: Sequence[dict[str, Any]], key: str, kinds: Sequence[str], scale: float, unit: str) -> Figure:
    figure, axes = new_figure(height=0.9 + 0.45 * len(summaries))
    left = np.zeros(len(summaries))
    for kind, colour in zip(kinds, COLOURS * 2, strict=False):
        width = np.array([s[key].get(kind, 0) / scale for s in summaries])
        if width.any():
            axes.barh([s["recipe"] for s in summaries], width, left=left, color=colour, label=label_of(kind))
            left = left + width
    axes.invert_yaxis()
    axes.set_xlabel(unit)
    axes.legend(loc="upper center", bbox_to_anchor=(0.4, -0.28), ncols=3)
    return figure


def write_compare_report(out_dir: Path, summaries: Sequence[dict[str, Any]]) -> Path:
    """Write `report.html` for the runs in `out_dir/<recipe>`, described by `summaries` (see `luffy compare`)."""
    runs = [read_run(out_dir / s["recipe"]) for s in summaries]
    per_step = [
        {**s, "stage_seconds": {k: s["seconds"].get(k, 0.0) / max(1, s["steps"]) for k in SECONDS_KINDS}}
        for s in summaries
    ]
    plots = (
        ("Loss against training time", lambda: _loss_against(runs, "seconds")),
        ("Loss against bytes that left a rank", lambda: _loss_against(runs, "bytes")),
        (
            "Where a step's time goes (mean)",
            lambda: _stacked(per_step, "stage_seconds", SECONDS_KINDS, 1, "s per step"),
        ),
        (
            "Bytes that left a rank (median step)",
            lambda: _stacked(per_step, "step_bytes", TOKEN_DIRECTIONS, 1e6, "MB per step"),
        ),
    )
    pictures = [{"caption": caption, "svg": draw(build)[1]} for caption, build in plots]
    rows = []
    for s in summaries:
        low, mid, high = s["step_seconds"]
        valid = s.get("valid_loss")
        rows.append(
            [
                s["recipe"],
                f"{mid:.3f} [{low:.3f}, {high:.3f}]",
                *(f"{mid_other:.2f}" for mid_other in _ratios(s, summaries)),
                format_bytes(sum(s["step_bytes"].values())),
                f"{100 * s['plan']['moved_share']:.0f}%",
                f"{format_seconds(s['plan']['seconds'])} ({format_seconds(s['plan']['exposed_seconds'])})",
                "-" if valid is None else f"{valid:.4f}",
            ]
        )
    head = ["recipe", "s per step [quartiles]", *(f"over {s['recipe']}" for s in summaries), "bytes a step",
            "moved", "plan (exposed)", "held-out loss"]  # fmt: skip
    html = render(
        "compare.html.j2",
        title=" / ".join(s["recipe"] for s in summaries) + f" on {summaries[0]['model']}",
        origin=origin(runs[0]),
        head=head,
        rows=rows,
        pictures=pictures,
    )
    page = out_dir / REPORT_FILE
    write_bytes_atomic(page, html.encode())
    return page


def _ratios(mine: dict[str, Any], summaries: Sequence[dict[str, Any]]) -> list[float]:
    """How many times faster `mine` is than each run (itself: 1)."""
    return [s["step_seconds"][1] / mine["step_seconds"][1] for s in summaries]
