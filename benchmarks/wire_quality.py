"""What wire formats do to quality: the same model trained with every row rounded, under every format.

    python benchmarks/wire_quality.py train --data FILE --device cuda --jobs 6 --out docs/results/wire_quality.json
    python benchmarks/wire_quality.py table docs/results/wire_quality.json
    python benchmarks/wire_quality.py figure docs/results/wire_quality.json --png docs/figures/wire_quality.png

One rank trains each model with a copy a (token, expert) pair, and rounds and condenses what stays as well (`,local`):
every row bears the error, as it would with one expert on each of 16 ranks, where nearly every row leaves. `luffy_max`
is that recipe's wire and condensation.

Schemes whose name begins with `moves` need two ranks, which share a GPU over gloo, and rows that stand for a (token,
rank) copy. A plan that weighs bytes answers low bits by staying, and would leave nothing to measure; here a *random*
plan moves as many sequences in every layer as balance admits: the wire and condensation bear moves, whether or not a
plan would choose them. They are compared with `moves`, the same with rows as they are, which computes the same function
as staying does. `moved` is the share of (sequence, layer) that changed its rank. Condensation is without its correction
there, which needs tokens that stay.

`train` resumes: what stands in the JSON is not trained again, and the file is written anew after every training. The
runs themselves are kept beside it, in a folder of its name.
"""

from __future__ import annotations

import json
import sys
import threading
from functools import partial
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import click
from matplotlib.figure import Figure
from trainings import LEARNING_RATE, LUFFY, MODEL, failure, fingerprint, side_by_side, training

from luffy.recipes import RECIPES, Recipe
from luffy.train.metrics import describe_machine, read_metrics, write_json_atomic
from luffy.wire_format import parse_wire

CONDENSE = "static:0.9,local,correct"
SCHEMES: dict[str, tuple[str, str]] = {  # --wire, --condense
    "none": ("model", "none"),
    "bf16": ("bf16,local", "none"),
    "int8": ("int8,local", "none"),
    "int4": ("int4,local", "none"),
    "int4-sr": ("int4-sr,local", "none"),
    "aggressive": ("aggressive,local", "none"),
    "condensed": ("model", CONDENSE),
    "luffy_max": ("aggressive,local", CONDENSE),
}
CONDENSE_MOVING = "static:0.9,local"
MORE: dict[str, tuple[str, str]] = {  # on request
    "int8-sr": ("int8-sr,local", "none"),
    "int4 rows": ("dispatch=int4,combine=int4,local", "none"),
    "int4 gradients": ("dispatch_backward=int4,combine_backward=int4,local", "none"),
    "int4-sr gradients": ("dispatch_backward=int4-sr,combine_backward=int4-sr,local", "none"),
    "condensed int8": ("int8,local", CONDENSE),
    "condensed int4": ("int4,local", CONDENSE),
    "moves": ("model", "none"),
    "moves condensed": ("model", CONDENSE_MOVING),
}
MOVES = Recipe("moves", "sequences move at random, in every layer", placement="random")
MOVING_RANKS = 2
ROWS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
SMALL = [
    "--model", "moe-gpt2-tiny", "--layers", "2", "--hidden-size", "64", "--heads", "2", "--experts", "4",
    "--expert-hidden-size", "64", "--max-sequence-length", "64", "--vocab-size", "500",
]  # fmt: skip


def moves(scheme: str) -> bool:
    return scheme.split()[0] == MOVES.name


Runs = dict[str, list[dict[str, Any]]]


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
        "moved": mean(r.get("plan", {}).get("moved_share", 0.0) for r in records),
        "row_bytes": sum(r["bytes"][kind] for r in records for kind in ROWS),
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
@click.option("--gpus", default=0, help="Spread them over so many GPUs.")
@click.option("--seeds", default="0,1,2", show_default=True)
@click.option("--schemes", default=",".join(SCHEMES), show_default=True, help=f"Or also of: {', '.join(MORE)}.")
@click.option("--steps", default=1000, show_default=True)
@click.option("--batch-size", default=16, show_default=True)
@click.option("--small", is_flag=True, help="A size for the CPU, to try the benchmark itself.")
@click.option("--seconds", default=1e9, help="Begin no training after so long.")
@click.option("--out", required=True, type=click.Path(path_type=Path), help="The JSON file.")
def train(
    data: str, device: str, jobs: int, gpus: int, seeds: str, schemes: str, steps: int, batch_size: int, small: bool,
    seconds: float, out: Path,
) -> None:  # fmt: skip
    """Train every scheme with every seed."""
    lock, corpus = threading.Lock(), fingerprint(data)
    size, length = (SMALL, 64) if small else (MODEL, 512)
    content = json.loads(out.read_text()) if out.exists() else {"environment": describe_machine(device), "runs": []}
    settings = {"model": size, "steps": steps, "batch_size": batch_size, "sequence_length": length, "lr": LEARNING_RATE}
    if content.setdefault("settings", settings) != settings:
        raise click.ClickException(f"{out} holds runs with other settings; name another file")
    unknown = [s for s in schemes.split(",") if s not in SCHEMES | MORE]
    if unknown:
        raise click.ClickException(f"--schemes: no scheme {', '.join(unknown)}")
    out.parent.mkdir(parents=True, exist_ok=True)

    def one(seed: int, scheme: str, variables: dict[str, str]) -> str:
        if any((r["scheme"], r["seed"], r["corpus"]) == (scheme, seed, corpus) for r in content["runs"]):
            return "done before"
        target = out.with_suffix("") / f"{scheme.replace(' ', '-')}-seed{seed}"
        wire, condense = (SCHEMES | MORE)[scheme]
        options = ["--wire", wire, "--condense", condense, *training(
            size, target, data=data, device=device, seed=seed, steps=steps, batch_size=batch_size,
            sequence_length=length,
        )]  # fmt: skip
        if moves(scheme):
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node"]
            command += [str(MOVING_RANKS), __file__, "rank", "--recipe", MOVES.name, "--backend", "gloo", *options]
        else:
            command = [*LUFFY, "train", "--recipe", "vanilla", "--ranks", "1", *options]
        if (problem := failure(command, variables)) is not None:
            return problem
        about = {"scheme": scheme, "seed": seed, "corpus": corpus, "wire": wire, "condense": condense}
        result = about | outcome(target)
        with lock:
            content["runs"].append(result)
            write_json_atomic(out, content)
        return f"{result['valid_loss']:.4f}"

    pairs = [(int(seed), scheme) for seed in seeds.split(",") for scheme in schemes.split(",")]
    work = [(f"{scheme} seed {seed}", partial(one, seed, scheme)) for seed, scheme in pairs]
    side_by_side(work, jobs=jobs, gpus=gpus, seconds=seconds)


@main.command(context_settings={"ignore_unknown_options": True})
@click.argument("options", nargs=-1, type=click.UNPROCESSED)
def rank(options: tuple[str, ...]) -> None:
    """One rank, under torchrun, of a training whose recipe only this benchmark has; options as of luffy train."""
    from luffy.train.cli import cli

    RECIPES[MOVES.name] = MOVES
    cli(["train", *options])


def by_scheme(path: Path) -> Runs:
    runs = json.loads(path.read_text())["runs"]
    order = [s for s in SCHEMES | MORE if any(r["scheme"] == s for r in runs)]
    return {s: sorted((r for r in runs if r["scheme"] == s), key=lambda r: r["seed"]) for s in order}


Pair = tuple[str, int]  # runs of one corpus and one seed read the same sequences, and may be compared


def pair_of(run: dict[str, Any]) -> Pair:
    return run["corpus"], run["seed"]


def bases(runs_of: Runs) -> dict[Pair, dict[str, Any]]:
    """For each pair the run that rounds nothing: none, or else bf16, as the stream is bfloat16."""
    return {pair_of(r): r for scheme in ("bf16", "none") for r in runs_of.get(scheme, [])}


def gaps_to(base: dict[Pair, dict[str, Any]], runs: list[dict[str, Any]]) -> list[float]:
    """Held-out loss of each run above that of its pair's base, if that is another run."""
    return [
        r["valid_loss"] - base[pair_of(r)]["valid_loss"]
        for r in runs
        if pair_of(r) in base and base[pair_of(r)] is not r
    ]


def byte_share(run: dict[str, Any], runs_of: Runs) -> float | None:
    """Bytes of rows over those of rows as they are: by count of bits, or as metered beside `moves` of the seed."""
    if not moves(run["scheme"]):
        return bits_per_value(run["scheme"]) * run["kept"] / 16
    whole = [r["row_bytes"] for r in runs_of.get(MOVES.name, []) if pair_of(r) == pair_of(run)]
    return run["row_bytes"] / whole[0] if whole else None


def as_gap(gaps: list[float]) -> str:
    return f"{mean(gaps):+.3f}" + (f" ± {stdev(gaps):.3f}" if len(gaps) > 1 else "") if gaps else ""


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True))
def table(results: Path) -> None:
    """Markdown: means over runs, gaps within pairs of the same corpus and seed."""
    runs_of = by_scheme(results)
    base, moved = bases(runs_of), {pair_of(r): r for r in runs_of.get(MOVES.name, [])}
    click.echo(
        "| scheme | runs | bits a value | copies sent | moved | bytes, share | pairs | held-out loss above none | "
        "above moves |"
    )
    click.echo("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for scheme, runs in runs_of.items():
        shares = [share for r in runs if (share := byte_share(r, runs_of)) is not None]
        cells = [
            scheme,
            str(len(runs)),
            f"{bits_per_value(scheme):.2f}",
            f"{mean(r['kept'] for r in runs):.2f}",
            f"{mean(r['moved'] for r in runs):.2f}" if moves(scheme) else "",
            f"{mean(shares):.2f}" if shares else "",
            str(len(gaps_to(base, runs)) or ""),
            as_gap(gaps_to(base, runs)),
            as_gap(gaps_to(moved, runs)) if moves(scheme) else "",
        ]
        click.echo(f"| {' | '.join(cells)} |")


DRAWN = ("none", "int8", "int4", "int4-sr", "aggressive", "condensed")


@main.command()
@click.argument("results", type=click.Path(path_type=Path, exists=True))
@click.option("--png", required=True, type=click.Path(path_type=Path))
def figure(results: Path, png: Path) -> None:
    """Left: bytes against loss gap, a point a seed and the mean. Right: held-out loss above that of none, by step.

    Of DRAWN alone: the table has all.
    """
    runs_of = by_scheme(results)
    base = {(pair, step): loss for pair, r in bases(runs_of).items() for step, loss in r["curve"]}
    if not base:
        raise click.ClickException("the file has no runs of scheme none to compare with")
    picture = Figure(figsize=(11, 5), layout="constrained")
    left, right = picture.subplots(1, 2)
    for i, scheme in enumerate(s for s in DRAWN if s in runs_of):
        colour, marker, runs = f"C{i}", "o", runs_of[scheme]
        found = [(share, r["valid_loss"] - base[pair_of(r), r["steps"]]) for r in runs
                 if (pair_of(r), r["steps"]) in base and (share := byte_share(r, runs_of)) is not None]  # fmt: skip
        if not found:
            continue
        share, gaps = zip(*found, strict=True)
        left.scatter(share, gaps, s=12, color=colour, alpha=0.4, marker=marker)
        left.scatter(mean(share), mean(gaps), s=55, color=colour, label=scheme, marker=marker)
        curves = [[(step, loss - base[pair_of(r), step]) for step, loss in r["curve"] if (pair_of(r), step) in base]
                  for r in runs]  # fmt: skip
        points = list(zip(*[c for c in curves if c], strict=False))
        right.plot([at[0][0] for at in points], [mean(gap for _, gap in at) for at in points], color=colour,
                   marker=marker, markersize=4, linewidth=1.2)  # fmt: skip
    for axes in (left, right):
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        axes.spines[["top", "right"]].set_visible(False)
    left.set(xlabel="bytes of rows, share of bfloat16 rows", ylabel="held-out loss above none (nats)",
             title="What is spared, and what it costs")  # fmt: skip
    picture.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=6, frameon=False, fontsize=8)
    right.set(xlabel="step", ylabel="held-out loss above none (nats)", title="In the course of training")
    png.parent.mkdir(parents=True, exist_ok=True)
    picture.savefig(png, dpi=150)


if __name__ == "__main__":
    main()
