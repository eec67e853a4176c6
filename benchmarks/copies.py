"""What does a copy cost? (token, expert) pairs against (token, rank) copies, on the same data and seed.

    python benchmarks/copies.py --out docs/results/copies.json --figure docs/figures/copies.png

Trains each model with the recipes `vanilla` and `vanilla_dedup` on 4 local CPU ranks (gloo over loopback, not shaped)
and reports the token bytes that left a rank and the step time: medians over the steps after warm-up, with quartiles.
The losses are printed too: both recipes compute the same function.
"""

import json
import platform
import subprocess
import sys
import tempfile
from pathlib import Path

import click
import numpy as np

from luffy.report import style
from luffy.train.metrics import read_metrics

CASES = (("moe-gpt2-tiny", 8, 2), ("moe-gpt2-tiny", 16, 4), ("moe-llm-tiny", 16, 4), ("moe-llm-tiny", 32, 8))
RECIPES = ("vanilla", "vanilla_dedup")
DIRECTIONS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
WARM_UP = 5


def measure(model: str, experts: int, top_k: int, recipe: str, steps: int) -> dict[str, object]:
    """One run: median token bytes per token and seconds per step, with quartiles, and the last loss."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "luffy.train.cli", "train", "--recipe", recipe, "--model", model]
        command += ["--experts", str(experts), "--top-k", str(top_k), "--ranks", "4", "--steps", str(steps)]
        command += ["--batch-size", "16", "--sequence-length", "128", "--vocab-size", "4096", "--data", "stdlib"]
        command += ["--device", "cpu", "--eval-every", "0", "--eval-batches", "1", "--checkpoint-every", "0"]
        subprocess.run([*command, "--out", folder, "--no-tensorboard"], check=True, capture_output=True)
        records = read_metrics(Path(folder, "metrics.jsonl"))[WARM_UP:]
    per_token = [sum(r["bytes"][d] for d in DIRECTIONS) / r["tokens"] for r in records]
    seconds = [r["seconds"] for r in records]
    return {
        "model": model,
        "experts": experts,
        "top_k": top_k,
        "recipe": recipe,
        "bytes_per_token": float(np.median(per_token)),
        "seconds": [float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75)],
        "loss": records[-1]["loss"],
    }


def draw(rows: list[dict], path: Path) -> None:
    with style.settings():
        figure, axes = style.new_figure(height=3.6, width=7)
        for i, (recipe, colour) in enumerate(zip(RECIPES, (style.GREY, style.BLUE), strict=True)):
            mine = [r for r in rows if r["recipe"] == recipe]
            sent = [r["bytes_per_token"] / 1e3 for r in mine]
            bars = axes.barh(np.arange(len(mine)) + 0.4 * i, sent, 0.38, color=colour)
            axes.bar_label(bars, [f"{kb:.1f}  {recipe}" for kb in sent], fontsize=8, padding=3)
        names = [f"{r['model']}\n{r['experts']} experts, top-{r['top_k']}" for r in rows if r["recipe"] == RECIPES[0]]
        axes.set_yticks(np.arange(len(names)) + 0.2, names, fontsize=8)
        axes.invert_yaxis()
        axes.margins(x=0.2)
        axes.set(
            xlabel="kB that left a rank, a token and step", title="Token traffic of 4 ranks, measured by the meter"
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=150)


@click.command()
@click.option("--steps", default=25)
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--figure", default=None, type=click.Path(path_type=Path))
def main(steps: int, out: Path, figure: Path | None) -> None:
    """Measure all cases, write JSON, draw the figure."""
    rows = [measure(*case, recipe, steps) for case in CASES for recipe in RECIPES]
    out.parent.mkdir(parents=True, exist_ok=True)
    host = platform.processor() or platform.machine()
    out.write_text(json.dumps({"host": host, "cpu_ranks": 4, "rows": rows}, indent=1))
    for r in rows:
        low, mid, high = r["seconds"]
        click.echo(
            f"{r['model']:<14} E={r['experts']:<3} k={r['top_k']}  {r['recipe']:<14} "
            f"{r['bytes_per_token'] / 1e3:7.2f} kB/token  {mid:.3f} s [{low:.3f}, {high:.3f}]  loss {r['loss']:.6f}"
        )
    if figure is not None:
        draw(rows, figure)


if __name__ == "__main__":
    main()
