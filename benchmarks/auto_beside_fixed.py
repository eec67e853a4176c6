"""Is `--recipe auto` as fast as the best fixed recipe, whatever the links? And what does finding out cost?

    python benchmarks/auto_beside_fixed.py --out runs/auto --json docs/results/auto.json    (needs root: emulated links)
    python benchmarks/auto_beside_fixed.py ... --docs docs/research/baselines.md    also writes its table there

Each cell (ranks, rate of a link, sequences a rank) is one launch in a lab, in which all recipes take turns of five
steps (benchmarks/multigpu_ranks.py): whatever else slows the machine slows all alike. Two numbers a cell, both over the
fixed recipe that is fastest by the same number: *settled*, median of the last third of the steps, and *whole run*, the
sum of all steps, so with everything that looking and trying cost. The first turn of each and the first step of a turn
count in neither. A call ends after --budget-seconds; call again to go on. `luffy` seats sequences here and re-homes
nothing: that takes longer runs than these. `auto` tries seats and overlap (luffy.train.parts.tuning); `janus` and
`fastermoe`, which it does not try, show where another recipe would have been faster.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from compare_tools import LUFFY, STOPPING_SECONDS, run_for

from luffy.train.metrics import write_json_atomic

FIXED = ("vanilla_dedup", "janus", "fastermoe", "luffy")
CELLS = "2:100mbit:12,2:250mbit:4,2:1gbit:12,4:100mbit:4,4:250mbit:12,4:1gbit:4"
BEGIN, END = "<!-- auto beside fixed recipes: begin -->", "<!-- auto beside fixed recipes: end -->"
RANKS_FILE = Path(__file__).with_name("multigpu_ranks.py")


def command_of(cell: str, steps: int, device: str, target: Path, more: tuple[str, ...]) -> list[str]:
    """RANKS:LINK:SEQUENCES, sequences a rank and step."""
    ranks, link, sequences = cell.split(":")
    options = ["--device", device, "--backend", "gloo", "--ranks", ranks, "--model", "moe-gpt2-tiny"]
    options += ["--vocab-size", "2048", "--sequence-length", "128", "--batch-size", str(int(ranks) * int(sequences))]
    options += ["--rehome-every", "0", "--no-profile-attention", "--out", str(target.with_suffix("")), *more]
    inside = [sys.executable, str(RANKS_FILE), "--entries", ";".join((*FIXED, "auto")), "--steps", str(steps)]
    inside += ["--options", shlex.join(options), "--rate-bytes", str(1 << 20)]
    inside += ["--turn-seconds", "300", "--json", str(target)]
    return [*LUFFY, "lab", "--ranks", ranks, "--link", link, "--per-rank", "--", *inside]


def read_cell(found: dict[str, Any]) -> dict[str, Any]:
    """Settled and whole-run seconds by recipe, and what auto wrote down."""
    settled, whole = {}, {}
    for name, records in found["entries"].items():
        last = [r["seconds"] for r in records[-max(1, len(records) // 3) :] if r["counted"]]
        settled[name] = np.quantile(last, [0.25, 0.5, 0.75]).tolist()
        whole[name] = sum(r["seconds"] for r in records if r["counted"])
    best = {"settled": min(FIXED, key=lambda n: settled[n][1]), "whole run": min(FIXED, key=lambda n: whole[n])}
    return {
        "bytes_per_second": found["bytes_per_second"],
        "hardware": found["environment"],
        "settled_seconds": settled,
        "whole_run_seconds": whole,
        "best_fixed": best,
        "settled_over_best": settled["auto"][1] / settled[best["settled"]][1],
        "whole_run_over_best": whole["auto"] / whole[best["whole run"]],
        "whole_run_over_vanilla_dedup": whole["auto"] / whole["vanilla_dedup"],
        "auto": [{"step": i + 1, **r["auto"]} for i, r in enumerate(found["entries"]["auto"]) if "auto" in r],
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
    about = (
        f"Emulated links, recipes by turns; median seconds of the last third of {steps} steps, the best fixed in bold."
    )
    lines += ["", about]
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
@click.option("--steps", default=100, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--budget-seconds", default=520.0, show_default=True, help="Then stop; call again to go on.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(
    out: Path, target: Path | None, docs: Path | None, asked: str, steps: int, device: str, budget_seconds: float,
    more: tuple[str, ...],
) -> None:  # fmt: skip
    deadline, planned = time.monotonic() + budget_seconds, asked.split(",")
    out.mkdir(parents=True, exist_ok=True)
    cells: dict[str, dict[str, Any]] = {}
    for cell in planned:
        path = out.resolve() / f"{cell.replace(':', '-')}-{steps}.json"
        if not path.exists() or not json.loads(path.read_text())["complete"]:
            seconds = deadline - STOPPING_SECONDS - time.monotonic()
            if seconds <= 0:
                break
            status = run_for(command_of(cell, steps, device, path, more), seconds)
            if status is None:
                break
            if status:
                sys.exit(status)
        cells[cell] = read_cell(json.loads(path.read_text()))
    complete = len(cells) == len(planned)
    if cells:
        table = markdown(cells, steps)
        click.echo(table)
        worst = {name: max(c[name] for c in cells.values()) for name in ("settled_over_best", "whole_run_over_best")}
        click.echo(", ".join(f"{name} at worst {value:.3f}" for name, value in worst.items()))
        if target is not None:
            about = {"provenance": "emulated", "steps": steps, "complete": complete, "worst": worst, "cells": cells}
            write_json_atomic(target, about)
        if docs is not None and complete:
            write_into(docs, table)
    if not complete:
        click.echo(f"{len(cells)} of {len(planned)} cells are finished; call again to continue", err=True)


if __name__ == "__main__":
    main()
