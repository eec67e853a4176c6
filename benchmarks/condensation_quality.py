"""What condensation does to quality, and how many rows it spares: the same model trained under every scheme.

    python benchmarks/condensation_quality.py train --data FOLDER --device cuda --jobs 6 --out runs/condense
    python benchmarks/condensation_quality.py table --out runs/condense --json docs/results/condensation_quality.json \
        --figure docs/figures/condensation_pareto.png

One rank trains each model with a copy a (token, expert) pair, and condenses the copies that stay as well (`,local`):
every copy bears the error, as it would with one expert on each of 16 ranks, where nearly every copy leaves. What is
compared with bytes is therefore the share of copies that is sent, counted by the layers in every step. `train` resumes:
what has a summary is not trained again.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import click
from matplotlib.figure import Figure
from trainings import LUFFY, MODEL, failure, side_by_side, training

from luffy.train.metrics import read_metrics

SCHEMES = {
    "none": ["--condense", "none"],
    "static 0.9": ["--condense", "static:0.9,local"],
    "static 0.8": ["--condense", "static:0.8,local"],
    "paper": ["--condense", "paper"],
    "lsh_moe, causal": ["--condense", "lsh-causal:6,local"],
    "lsh_moe (published, leaks)": ["--condense", "lsh:6"],
    "static 0.9, corrected": ["--condense", "static:0.9,local,correct"],
    "static 0.8, corrected": ["--condense", "static:0.8,local,correct"],
    "static 0.95": ["--condense", "static:0.95,local"],
}


def folder(out: Path, scheme: str, seed: int) -> Path:
    return out / f"{'-'.join(scheme.replace(',', '').replace('(', '').replace(')', '').split())}-seed{seed}"


@click.group()
def main() -> None:
    """Train the models, or tabulate what they came to."""


@main.command()
@click.option("--data", required=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--jobs", default=6, show_default=True, help="Trainings side by side.")
@click.option("--gpus", default=0, help="Spread them over so many GPUs.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--schemes", default="all", show_default=True, help="Names separated by ';', or all.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--seconds", default=1e9, help="Begin no training after so long.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def train(
    data: str, device: str, jobs: int, gpus: int, seeds: str, schemes: str, steps: int, batch_size: int,
    seconds: float, out: Path,
) -> None:  # fmt: skip
    """Train every scheme with every seed."""
    names = list(SCHEMES) if schemes == "all" else schemes.split(";")

    def one(seed: int, scheme: str, variables: dict[str, str]) -> str:
        target = folder(out, scheme, seed)
        if (target / "summary.json").exists():
            return "done before"
        shared = training(
            MODEL, target, data=data, device=device, seed=seed, steps=steps, batch_size=batch_size, sequence_length=512
        )
        command = [*LUFFY, "train", "--recipe", "vanilla", *SCHEMES[scheme], "--ranks", "1", *shared]
        return failure(command, variables) or "trained"

    work = [
        (folder(out, scheme, seed).name, partial(one, seed, scheme))
        for seed in map(int, seeds.split(","))
        for scheme in names
    ]
    side_by_side(work, jobs=jobs, gpus=gpus, seconds=seconds)


def collect(out: Path, steps: int) -> dict[str, list[dict]]:
    """By scheme, what each seed's run came to: held-out loss, share of copies sent, curves."""
    results: dict[str, list[dict]] = {}
    for scheme in SCHEMES:
        for seed in range(16):
            run = folder(out, scheme, seed)
            if not (run / "metrics.jsonl").exists():
                continue
            records = read_metrics(run / "metrics.jsonl")
            if records[-1]["step"] < steps:
                continue  # broken off
            kept = [r.get("condense", {}).get("kept", 1.0) for r in records]
            curve, sent = [], 0.0
            for r, k in zip(records, kept, strict=True):
                sent += k * r["tokens"]
                if r.get("valid_loss") is not None:
                    curve.append([r["step"], sent, r["valid_loss"]])
            last = [r["condense"] for r in records if len(r.get("condense", {})) > 1]
            results.setdefault(scheme, []).append({
                "seed": seed, "steps": curve[-1][0],
                "valid_loss": curve[-1][2], "kept": mean(kept), "kept_last_100": mean(kept[-100:]),
                "seconds": sum(r["seconds"] for r in records), "curve": curve, "last": last[-1] if last else None,
                "condense_seconds": sum(r["seconds_split"]["condense"] for r in records),
            })  # fmt: skip
    return results


@main.command()
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--json", "target", type=click.Path(path_type=Path))
@click.option("--figure", type=click.Path(path_type=Path))
@click.option("--steps", default=1000, show_default=True, help="What a run must have reached to count.")
def table(out: Path, target: Path | None, figure: Path | None, steps: int) -> None:
    """Print a table of means over seeds; write the numbers and the picture."""
    results = collect(out, steps)
    click.echo("| scheme | seeds | steps | copies sent | held-out loss | gap to none (paired) |")
    click.echo("| --- | --- | --- | --- | --- | --- |")
    for scheme, runs in results.items():
        gaps = gaps_to_none(runs, results["none"])
        spread = f" ± {stdev(gaps):.3f}" if len(gaps) > 1 and scheme != "none" else ""
        click.echo(
            f"| {scheme} | {len(runs)} | {min(r['steps'] for r in runs)} | {mean(r['kept'] for r in runs):.2f} | "
            f"{mean(r['valid_loss'] for r in runs):.3f} | {mean(gaps):+.3f}{spread} |"
        )
    if target is not None:
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(results, indent=1) + "\n")
    if figure is not None:
        picture = draw(results)
        figure.parent.mkdir(parents=True, exist_ok=True)
        picture.savefig(figure, dpi=150)


def gaps_to_none(runs: list[dict], none: list[dict]) -> list[float]:
    """Held-out loss of each run above that of the uncondensed run of its seed, both after as many steps."""
    base = {(r["seed"], step): loss for r in none for step, _, loss in r["curve"]}
    return [r["valid_loss"] - base[r["seed"], r["steps"]] for r in runs if (r["seed"], r["steps"]) in base]


DRAWN = ("none", "static 0.9", "static 0.9, corrected", "budget 0.2", "lsh_moe, causal", "paper")


def draw(results: dict[str, list[dict]]) -> Figure:
    """Left: bytes against loss gap, one point a seed and the mean. Right: loss against what was sent so far.

    Of DRAWN alone: the table has all.
    """
    picture = Figure(figsize=(11, 4.6), layout="constrained")
    left, right = picture.subplots(1, 2)
    for i, scheme in enumerate(s for s in DRAWN if s in results):
        colour, marker, runs = f"C{i}", "o", results[scheme]
        gaps = gaps_to_none(runs, results["none"])
        if (fewest := min(r["steps"] for r in runs)) < min(r["steps"] for r in results["none"]):
            scheme += f" (at step {fewest})"
        left.scatter([r["kept"] for r in runs], gaps, s=12, color=colour, alpha=0.4, marker=marker)
        left.scatter(mean(r["kept"] for r in runs), mean(gaps), s=55, color=colour, label=scheme, marker=marker)
        points = list(zip(*[r["curve"] for r in runs], strict=False))  # as far as all of them came
        x = [mean(p[1] for p in at) / 1e6 for at in points]
        right.plot(
            x, [mean(p[2] for p in at) for at in points], color=colour, linewidth=1.2, marker=marker, markersize=4
        )
    left.axhline(0, color="0.7", linewidth=0.8, zorder=0)
    left.set(xlabel="share of copies sent, mean over the run", ylabel="held-out loss above none (nats)",
             title="What is spared, and what it costs")  # fmt: skip
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="copies sent so far (millions of tokens' worth)", ylabel="held-out loss (nats)",
              title="Loss against what was sent", ylim=(None, right.get_ylim()[0] + 2.2))  # fmt: skip
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    return picture


if __name__ == "__main__":
    main()
