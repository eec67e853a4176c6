"""Is `--recipe auto` as fast as the best fixed recipe, whatever the links? And what does finding out cost?

    python benchmarks/auto_beside_fixed.py --out runs/auto --json docs/results/auto.json    (needs root: emulated links)
    python benchmarks/auto_beside_fixed.py ... --docs docs/baselines.md                     also writes its table there

Each cell (ranks, rate of a link, sequences a rank) is one `luffy compare` in a lab, recipes one after another, in turn
if repeated. Two numbers a cell, both over the fixed recipe that is fastest by the same number: *settled*, median of the
last third of the steps, and *whole run*, the sum of all steps, so with everything that looking and trying cost. A call
ends after --budget-seconds; call again to go on. `luffy` moves sequences here and re-homes nothing: that takes longer
runs than these.
"""

from __future__ import annotations

import re
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from compare_tools import Cell, Settings, folder_of, run_cell

from luffy.report.runs import read_metrics
from luffy.train.metrics import describe_machine, write_json_atomic

FIXED = ("vanilla_dedup", "janus", "fastermoe", "luffy")
CELLS = "2:100mbit:12,2:250mbit:4,2:1gbit:12,4:100mbit:4,4:250mbit:12,4:1gbit:4"
BEGIN, END = "<!-- auto beside fixed recipes: begin -->", "<!-- auto beside fixed recipes: end -->"


def parse_cell(text: str, more: tuple[str, ...], repeats: int) -> Cell:
    """RANKS:LINK:SEQUENCES, sequences a rank and step."""
    ranks, link, sequences = text.split(":")
    options = ["--model", "moe-gpt2-tiny", "--vocab-size", "2048", "--sequence-length", "128", "--eval-every", "0",
               "--eval-batches", "1", "--batch-size", str(int(ranks) * int(sequences)), "--rehome-every", "0",
               "--no-profile-attention", *more]  # fmt: skip
    return Cell(text, ",".join((*FIXED, "auto")), options, ranks=int(ranks), link=link, repeats=repeats)


def read_cell(summaries: list[dict[str, Any]], folder: Path) -> dict[str, Any]:
    """Settled and whole-run seconds by recipe, all repeats together, and what auto wrote down."""
    settled, whole, written = {}, {}, []
    for summary in summaries:
        last: list[float] = []
        total = 0.0
        for name in summary["folders"]:
            records = read_metrics(folder / name / "metrics.jsonl")
            seconds = [r["seconds"] for r in records]
            last += seconds[-max(1, len(seconds) // 3) :]
            total += sum(seconds)
            written += [{"step": r["step"], **r["auto"]} for r in records if "auto" in r]
        settled[summary["label"]] = np.quantile(last, [0.25, 0.5, 0.75]).tolist()
        whole[summary["label"]] = total
    best = {"settled": min(FIXED, key=lambda n: settled[n][1]), "whole run": min(FIXED, key=lambda n: whole[n])}
    return {
        "network": summaries[0].get("network"),
        "settled_seconds": settled,
        "whole_run_seconds": whole,
        "best_fixed": best,
        "settled_over_best": settled["auto"][1] / settled[best["settled"]][1],
        "whole_run_over_best": whole["auto"] / whole[best["whole run"]],
        "whole_run_over_vanilla_dedup": whole["auto"] / whole["vanilla_dedup"],
        "auto": written,
    }


def markdown(cells: dict[str, dict[str, Any]], steps: int) -> str:
    """One row a cell; the fastest fixed recipe in bold."""
    head = ["ranks, link, sequences a rank", *FIXED, "auto", "auto / best, settled", "auto / best, whole run"]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for key, cell in cells.items():
        settled, best = cell["settled_seconds"], cell["best_fixed"]["settled"]
        shown = [f"**{settled[n][1]:.3f}**" if n == best else f"{settled[n][1]:.3f}" for n in (*FIXED, "auto")]
        ratios = [f"{cell[name]:.3f}" for name in ("settled_over_best", "whole_run_over_best")]
        lines.append("| " + " | ".join([key.replace(":", ", "), *shown, *ratios]) + " |")
    lines += ["", f"Emulated links; median seconds of the last third of {steps} steps, the best fixed recipe in bold."]
    return "\n".join(lines)


def write_into(docs: Path, text: str) -> None:
    """Put the table between its marks."""
    page = docs.read_text("utf-8")
    found, count = re.subn(
        f"{re.escape(BEGIN)}.*?{re.escape(END)}", lambda _: f"{BEGIN}\n{text}\n{END}", page, flags=re.S
    )
    if count != 1:
        raise click.ClickException(f"--docs {docs}: does not have the marks {BEGIN} and {END} once")
    docs.write_text(found, "utf-8")


@click.command(help=__doc__)
@click.option("--out", default="runs/auto", show_default=True, type=click.Path(path_type=Path))
@click.option("--json", "target", type=click.Path(path_type=Path))
@click.option("--docs", type=click.Path(path_type=Path, exists=True), help="Page whose marked table is replaced.")
@click.option("--cells", "asked", default=CELLS, show_default=True, help="RANKS:LINK:SEQUENCES,...")
@click.option("--steps", default=200, show_default=True)
@click.option("--repeats", default=1, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--budget-seconds", default=520.0, show_default=True, help="Then stop; call again to go on.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(
    out: Path, target: Path | None, docs: Path | None, asked: str, steps: int, repeats: int, device: str,
    budget_seconds: float, more: tuple[str, ...],
) -> None:  # fmt: skip
    planned = [parse_cell(text, more, repeats) for text in asked.split(",")]
    s = Settings(device, 0, (None,), steps, out, time.monotonic() + budget_seconds, False, ())
    cells: dict[str, dict[str, Any]] = {}
    for cell in planned:
        summaries = run_cell(cell, s)
        if summaries is None:
            break
        cells[cell.key] = read_cell(summaries, folder_of(cell, s))
    complete = len(cells) == len(planned)
    if cells:
        table = markdown(cells, steps)
        click.echo(table)
        worst = {name: max(c[name] for c in cells.values()) for name in ("settled_over_best", "whole_run_over_best")}
        click.echo(", ".join(f"{name} at worst {value:.3f}" for name, value in worst.items()))
        if target is not None:
            about = {"provenance": "emulated", "hardware": describe_machine(device), "steps": steps, "repeats": repeats}
            write_json_atomic(target, about | {"complete": complete, "worst": worst, "cells": cells})
        if docs is not None and complete:
            write_into(docs, table)
    if not complete:
        click.echo(f"{len(cells)} of {len(planned)} cells are finished; call again to continue", err=True)


if __name__ == "__main__":
    main()
