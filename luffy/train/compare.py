"""`luffy compare`: several recipes on the same data and seed, one table, one page.

Each recipe is an ordinary run in a folder of its own, so everything that `luffy train` writes is there to look at. Runs
follow one another on the same machine; a speed-up is the ratio of median step times after warm-up, and the quartiles
beside it say how far to trust it.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from luffy.errors import UserError
from luffy.recipes import get_recipe
from luffy.report.compare import write_compare_report
from luffy.report.runs import read_run, warmup_steps, write_json_atomic
from luffy.report.units import format_bytes, format_seconds
from luffy.train.launch import under_torchrun
from luffy.train.options import TrainOptions
from luffy.train.run import start


def compare(names: str, options: TrainOptions) -> list[dict[str, Any]]:
    """Train with each of `names` (comma-separated) and write compare.json and report.html to --out.

    Returns the summaries, each with `step_seconds` (quartiles) and `speedup_over` {recipe: ratio of median step times}.
    Raises UserError for unknown or repeated recipes.
    """
    recipes = [n.strip() for n in names.split(",") if n.strip()]
    if len(recipes) < 2 or len(set(recipes)) < len(recipes):
        raise UserError(f"--recipes {names!r}: name at least two different recipes, separated by commas")
    if under_torchrun():
        raise UserError("luffy compare starts its own ranks (--ranks); run it without torchrun")
    for name in recipes:
        get_recipe(name)
    out = Path(options.out)
    summaries = []
    for name in recipes:
        click.echo(f"== {name}", err=True)
        run = replace(options, recipe=name, out=str(out / name))
        if options.resume and (out / name / "summary.json").exists():
            click.echo("already finished", err=True)
        else:
            start(run)
        summaries.append(summarise(out / name))
    for mine in summaries:
        median = mine["step_seconds"][1]
        mine["speedup_over"] = {o["recipe"]: o["step_seconds"][1] / median for o in summaries if o is not mine}
    write_json_atomic(out / "compare.json", summaries)
    page = write_compare_report(out, summaries)
    click.echo(table(summaries))
    if "network" in summaries[0]:
        click.echo(f"network:     {summaries[0]['network']}")
    click.echo(f"report:      {page}")
    return summaries


def summarise(folder: Path) -> dict[str, Any]:
    """A run's summary, with per-step medians over the steps after warm-up."""
    run = read_run(folder)
    records = run.records[min(warmup_steps(len(run.records)), len(run.records) - 1) :]
    seconds = [r["seconds"] for r in records]

    def median(*path: str) -> float:
        values = []
        for record in records:
            value: Any = record
            for key in path:
                value = value.get(key, 0) if isinstance(value, dict) else 0
            values.append(float(value))
        return float(np.median(values))

    return {
        **run.summary,
        "step_seconds": [float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75)],
        "step_bytes": {d: median("bytes", d) for d in run.summary["bytes"]},
        "step_bytes_by_link": {c: median("bytes_by_link", c) for c in ("intra_node", "inter_node")},
        "plan": {k: median("plan", k) for k in ("moved_share", "seconds", "exposed_seconds")},
        "tokens_spread": median("tokens_max_over_mean"),
    }


def table(summaries: list[dict[str, Any]]) -> str:
    """One row a recipe, as text."""
    first = summaries[0]["recipe"]
    columns = ("recipe", "s/step [quartiles]", f"over {first}", "dispatch", "combine", "both backwards", "intra-node",
               "inter-node", "kept", "moved", "plan (exposed)", "tokens max/mean", "held-out loss")  # fmt: skip
    rows = [columns]
    for s in summaries:
        low, mid, high = s["step_seconds"]
        b = s["step_bytes"]
        valid = s.get("valid_loss")
        rows.append(
            (
                s["recipe"],
                f"{mid:.3f} [{low:.3f}, {high:.3f}]",
                f"{s['speedup_over'].get(first, 1.0):.2f}x",
                format_bytes(b["dispatch"]),
                format_bytes(b["combine"]),
                format_bytes(b["dispatch_backward"] + b["combine_backward"]),
                format_bytes(s["step_bytes_by_link"]["intra_node"]),
                format_bytes(s["step_bytes_by_link"]["inter_node"]),
                f"{100 * s.get('copies_kept', 1):.0f}%",
                f"{100 * s['plan']['moved_share']:.0f}%",
                f"{format_seconds(s['plan']['seconds'])} ({format_seconds(s['plan']['exposed_seconds'])})",
                f"{s['tokens_spread']:.2f}" if s["tokens_spread"] else "-",
                "-" if valid is None else f"{valid:.4f}",
            )
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    return "\n".join("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows)
