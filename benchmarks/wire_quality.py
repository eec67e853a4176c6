"""What wire formats do to quality: the same model trained with every row rounded, under every format.

    python benchmarks/wire_quality.py train --data FILE --device cuda --jobs 6 --out docs/results/wire_quality.json
    python benchmarks/wire_quality.py table docs/results/wire_quality.json
    python benchmarks/wire_quality.py figure docs/results/wire_quality.json --png docs/figures/wire_quality.png

One rank trains each model with a copy a (token, expert) pair, and rounds and condenses what stays as well (`,local`):
every row bears the error, as it would with one expert on each of 16 ranks, where nearly every row leaves. `luffy_max`
is that recipe's wire and condensation. `train` resumes: what stands in the JSON is not trained again, and the file is
written anew after every training. The runs themselves are kept beside it, in a folder of its name.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from matplotlib.figure import Figure

from luffy.train.metrics import describe_machine, read_metrics, write_json_atomic
from luffy.wire_format import parse_wire

CONDENSE = "static:0.9,local,correct"
SCHEMES: dict[str, tuple[str, str]] = {  # --wire, --condense
    "none": ("model", "none"),
    "bf16": ("bf16,local", "none"),
    "fp8": ("fp8,local", "none"),
    "int8": ("int8,local", "none"),
    "int4": ("int4,local", "none"),
    "int4-sr": ("int4-sr,local", "none"),
    "aggressive": ("aggressive,local", "none"),
    "condensed": ("model", CONDENSE),
    "luffy_max": ("aggressive,local", CONDENSE),
}
MORE = {  # on request
    "fp8_e5m2": ("fp8_e5m2,local", "none"),
    "int8-sr": ("int8-sr,local", "none"),
    "int4 rows": ("dispatch=int4,combine=int4,local", "none"),
    "int4 gradients": ("dispatch_backward=int4,combine_backward=int4,local", "none"),
    "int4-sr gradients": ("dispatch_backward=int4-sr,combine_backward=int4-sr,local", "none"),
}
MODEL = [
    "--model", "moe-gpt2", "--layers", "6", "--hidden-size", "512", "--heads", "8", "--experts", "16",
    "--expert-hidden-size", "2048", "--max-sequence-length", "512", "--vocab-size", "8192",
]  # fmt: skip
SMALL = [
    "--model", "moe-gpt2-tiny", "--layers", "2", "--hidden-size", "64", "--heads", "2", "--experts", "4",
    "--expert-hidden-size", "64", "--max-sequence-length", "64", "--vocab-size", "500",
]  # fmt: skip


def bits_per_value(scheme: str, size: int = 512) -> float:
    """Of a row of bfloat16, the mean over the four directions."""
    return 8 * parse_wire((SCHEMES | MORE)[scheme][0]).row_bytes(size, 2).mean / size


def outcome(run: Path) -> dict[str, Any]:
    """What a finished run came to."""
    records = read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    kept = [r.get("condense", {}).get("kept", 1.0) for r in records]
    return {
        "steps": records[-1]["step"],
        "valid_loss": summary["valid_loss"],
        "kept": mean(kept),
        "kept_last_100": mean(kept[-100:]),
        "seconds": sum(r["seconds"] for r in records),
        "curve": [[r["step"], r["valid_loss"]] for r in records if r.get("valid_loss") is not None],
    }


@click.group()
def main() -> None:
    """Train the models, or tabulate or draw what they came to."""


@main.command()
@click.option("--data", required=True)
@click.option("--device", default="cuda", show_default=True)
@click.option("--jobs", default=6, show_default=True, help="Trainings side by side.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--schemes", default=",".join(SCHEMES), show_default=True, help=f"Or also of: {', '.join(MORE)}.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--small", is_flag=True, help="A size for the CPU, to try the benchmark itself.")
@click.option("--seconds", default=1e9, help="Begin no training after so long.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The JSON file.")
def train(
    data: str, device: str, jobs: int, seeds: str, schemes: str, steps: int, batch_size: int, small: bool,
    seconds: float, out: Path,
) -> None:  # fmt: skip
    """Train every scheme with every seed."""
    began, lock = time.monotonic(), threading.Lock()
    size, length = (SMALL, 64) if small else (MODEL, 512)
    content = json.loads(out.read_text()) if out.exists() else {"environment": describe_machine(device), "runs": []}
    settings = {"model": size, "steps": steps, "batch_size": batch_size, "sequence_length": length, "lr": 1e-3}
    if content.setdefault("settings", settings) != settings:
        raise click.ClickException(f"{out} holds runs with other settings; name another file")
    out.parent.mkdir(parents=True, exist_ok=True)

    def one(seed: int, scheme: str) -> str:
        name = f"{scheme} seed {seed}"
        if any((r["scheme"], r["seed"]) == (scheme, seed) for r in content["runs"]):
            return f"{name}: done before"
        if time.monotonic() - began > seconds:
            return f"{name}: no time left"
        target = out.with_suffix("") / f"{scheme.replace(' ', '-')}-seed{seed}"
        wire, condense = (SCHEMES | MORE)[scheme]
        command = [sys.executable, "-m", "luffy.train.cli", "train", "--recipe", "vanilla", *size]
        command += ["--wire", wire, "--condense", condense, "--data", data, "--device", device, "--ranks", "1"]
        command += ["--steps", str(steps), "--batch-size", str(batch_size), "--sequence-length", str(length)]
        command += ["--seed", str(seed), "--lr", "1e-3", "--eval-every", str(max(1, steps // 10)), "--eval-batches"]
        command += ["8", "--keep-checkpoints", "0", "--no-tensorboard", "--out", str(target), "--overwrite"]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            return f"{name}: {done.stderr.strip()[-300:]}"
        result = {"scheme": scheme, "seed": seed, "wire": wire, "condense": condense} | outcome(target)
        with lock:
            content["runs"].append(result)
            write_json_atomic(out, content)
        return f"{name}: {result['valid_loss']:.4f}"

    unknown = [s for s in schemes.split(",") if s not in SCHEMES | MORE]
    if unknown:
        raise click.ClickException(f"--schemes: no scheme {', '.join(unknown)}")
    with ThreadPoolExecutor(jobs) as pool:
        pairs = [(int(seed), scheme) for seed in seeds.split(",") for scheme in schemes.split(",")]
        for line in pool.map(lambda pair: one(*pair), pairs):
            click.echo(f"{time.monotonic() - began:6.0f} s  {line}")


def by_scheme(path: Path) -> dict[str, list[dict[str, Any]]]:
    runs = json.loads(path.read_text())["runs"]
    order = [s for s in SCHEMES | MORE if any(r["scheme"] == s for r in runs)]
    return {s: sorted((r for r in runs if r["scheme"] == s), key=lambda r: r["seed"]) for s in order}


def gaps_to_none(runs: list[dict[str, Any]], none: list[dict[str, Any]]) -> list[float]:
    """Held-out loss of each run above that of the run as it is, of its seed."""
    base = {r["seed"]: r["valid_loss"] for r in none}
    return [r["valid_loss"] - base[r["seed"]] for r in runs if r["seed"] in base]


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True))
def table(results: Path) -> None:
    """Markdown: means over seeds."""
    runs_of = by_scheme(results)
    click.echo("| scheme | seeds | bits a value | copies sent | bytes, share | held-out loss | above none, paired |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for scheme, runs in runs_of.items():
        gaps = gaps_to_none(runs, runs_of.get("none", []))
        spread = f" ± {stdev(gaps):.3f}" if len(gaps) > 1 and scheme != "none" else ""
        bits, kept = bits_per_value(scheme), mean(r["kept"] for r in runs)
        gap = f"{mean(gaps):+.3f}{spread}" if gaps else ""
        loss = mean(r["valid_loss"] for r in runs)
        click.echo(
            f"| {scheme} | {len(runs)} | {bits:.2f} | {kept:.2f} | {bits * kept / 16:.2f} | {loss:.3f} | {gap} |"
        )


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True))
@click.option("--png", required=True, type=click.Path(path_type=Path))
def figure(results: Path, png: Path) -> None:
    """Left: bytes against loss gap, a point a seed and the mean. Right: held-out loss above that of none, by step."""
    runs_of = by_scheme(results)
    if "none" not in runs_of:
        raise click.ClickException("the file has no runs of scheme none to compare with")
    picture = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = picture.subplots(1, 2)
    base = {(r["seed"], step): loss for r in runs_of["none"] for step, loss in r["curve"]}
    for i, (scheme, runs) in enumerate(runs_of.items()):
        colour, marker = f"C{i % 10}", "os^Dv"[i // 10]
        share = [bits_per_value(scheme) * r["kept"] / 16 for r in runs if (r["seed"], r["steps"]) in base]
        gaps = gaps_to_none(runs, runs_of["none"])
        if not gaps:
            continue
        left.scatter(share, gaps, s=12, color=colour, alpha=0.4, marker=marker)
        left.scatter(mean(share), mean(gaps), s=55, color=colour, label=scheme, marker=marker)
        curves = [[(step, loss - base[r["seed"], step]) for step, loss in r["curve"] if (r["seed"], step) in base]
                  for r in runs]  # fmt: skip
        points = list(zip(*[c for c in curves if c], strict=False))
        right.plot([at[0][0] for at in points], [mean(gap for _, gap in at) for at in points], color=colour,
                   marker=marker, markersize=4, linewidth=1.2)  # fmt: skip
    for axes in (left, right):
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="bytes of rows, share of bfloat16 rows", ylabel="held-out loss above none (nats)",
             title="What is spared, and what it costs")  # fmt: skip
    left.legend(frameon=False, fontsize=7)
    right.set(xlabel="step", ylabel="held-out loss above none (nats)", title="In the course of training")
    png.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(png, dpi=150)


if __name__ == "__main__":
    main()
