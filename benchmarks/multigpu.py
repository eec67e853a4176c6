"""Ranks with a GPU each, over NCCL: with NVLink as it is, and held to sockets as a slow link.

    python benchmarks/multigpu.py --ranks 2 --budget-seconds 350 --out runs/multigpu \
        --json docs/results/multigpu.json -- --data FILE
    make bench-multigpu                                               (as many ranks as there are GPUs)

All recipes and the peers (benchmarks/peers; left out, aloud, where their packages are not installed) on the same model,
data and seed, over whatever joins the GPUs (NVLink, PCIe), and with NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1
NCCL_NET=Socket, where every byte goes through the loopback interface. One launch for each, in which the entries take
turns (benchmarks/multigpu_ranks.py). What each way carries is measured with all ranks at work.

Step times are medians with quartiles; the exposed exchange is what a rank waited for rows and for sums of gradients;
the roofline is the longer of computation and bytes of a rank over the measured rate. `auto` is judged by the last third
of its steps, beside those of `vanilla_dedup`: where the exchange costs next to nothing it has to get out of the way.

A way that is finished is not measured again by the next call; one that was stopped is measured anew. `--only-report`
shows what is there.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
from compare_tools import SOCKETS, STOPPING_SECONDS, bars, run_for

from luffy.report import style
from luffy.report.compare_table import as_text
from luffy.train.metrics import write_json_atomic

WAYS: dict[str, dict[str, str]] = {"as joined": {}, "sockets": SOCKETS}
BASE = "vanilla_dedup"
ENTRIES = (
    "vanilla;vanilla_dedup;luffy;auto;luffy_max;janus;fastermoe;luffy_paper;netmoe;"
    "vanilla_dedup+overlap=vanilla_dedup --overlap;hf_ep_layer;hf_ep"
)
WAITING = ("exchange", "gradients")
ROOT = Path(__file__).resolve().parents[1]


def options_of(device: str, ranks: int, small: bool, out: Path, more: tuple[str, ...]) -> list[str]:
    size = ["--model", "moe-gpt2", "--layers", "6", "--vocab-size", "8192", "--sequence-length", "512"]
    batch = 32 * ranks
    if small:
        size = ["--model", "moe-gpt2-tiny", "--layers", "2", "--vocab-size", "500", "--sequence-length", "64"]
        batch = 4 * ranks
    backend = ["--device", device, "--backend", "nccl" if device == "cuda" else "gloo"]
    rest = ["--ranks", str(ranks), "--batch-size", str(batch), "--gradient-dtype", "bfloat16", "--out", str(out)]
    return [*backend, *size, *rest, *more]


def measure(
    way: str, target: Path, entries: str, steps: int, options: list[str], ranks: int, turn_seconds: float,
    seconds: float, left_out: dict[str, str],
) -> None:  # fmt: skip
    """Launch until what is left of the entries has been measured, or the time is over. Leaves it at `target`.

    left_out: entries that have ended a launch, and why; what ends one here is added.
    """
    asked = [entries, steps, shlex.join(options)]
    if target.exists() and (found := json.loads(target.read_text()))["complete"] and found.get("whole") == asked:
        click.echo(f"{way}: already measured", err=True)
        return
    target.unlink(missing_ok=True)
    deadline = time.monotonic() + seconds
    while (seconds := deadline - time.monotonic()) > STOPPING_SECONDS:
        asked[0] = ";".join(e for e in entries.split(";") if e.split("=")[0].strip() not in left_out)
        culprit = launch(way, target, asked, ranks, turn_seconds, seconds)
        if culprit is None:
            break
        click.echo(f"{way}: again, without {culprit[0]}", err=True)
        left_out[culprit[0]] = culprit[1]
    else:
        click.echo(f"{way}: no time left", err=True)
    if target.exists():
        found = json.loads(target.read_text())
        found["failed"] |= left_out
        write_json_atomic(target, found | {"whole": [entries, steps, shlex.join(options)]})


def launch(
    way: str, target: Path, asked: list[Any], ranks: int, turn_seconds: float, seconds: float
) -> tuple[str, str] | None:
    """One launch. The entry that ended it, and why, if one did."""
    notes = target.with_suffix(".notes")
    shutil.rmtree(notes, ignore_errors=True)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(ROOT / "benchmarks" / "multigpu_ranks.py"), "--entries", asked[0], "--steps", str(asked[1])]
    command += ["--until", str(time.time() + seconds - STOPPING_SECONDS), "--options", asked[2], "--json", str(target)]
    command += ["--rate-bytes", str(64 << 20 if "cuda" in asked[2] else 1 << 20), "--turn-seconds", str(turn_seconds)]
    before = dict(os.environ)
    os.environ |= WAYS[way] | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    try:
        status = run_for(command, seconds)
    finally:
        os.environ.clear()
        os.environ |= before
    if status is None:
        click.echo(f"{way}: stopped, the time was over", err=True)
    elif status:
        # Where one failed and another waited for it, what failed says more.
        found = [json.loads(path.read_text()) for path in sorted(notes.glob("*.json"))]
        if found:
            said = max(found, key=lambda note: len(note["why"]))
            return said["label"], said["why"]
        click.echo(f"{way}: failed with {status}", err=True)
    return None


def quartiles(values: list[float]) -> list[float] | None:
    return [round(float(q), 5) for q in np.percentile(values, (25, 50, 75))] if values else None


def read(way: str, found: dict[str, Any]) -> list[dict[str, Any]]:
    """An object an entry: what its counted steps came to."""
    runs = []
    for label, records in found["entries"].items():
        counted = [r for r in records if r["counted"]]
        if not counted:
            continue
        seconds = [r["seconds"] for r in counted]
        last = [r["seconds"] for r in records[-max(1, len(records) // 3) :] if r["counted"]]
        sent = float(np.median([sum(r["bytes"].values()) for r in counted]))
        wire = sent / found["ranks"] / found["bytes_per_second"]
        run = {
            "links": way, "recipe": label, "label": label, "steps": len(records), "counted_steps": len(counted),
            "step_seconds": quartiles(seconds), "settled_seconds": float(np.median(last)),
            "tokens": float(np.median([r["tokens"] for r in counted])), "bytes": sent, "wire_seconds": wire,
            "last_loss": records[-1]["loss"], "auto": [r["auto"] for r in records if "auto" in r],
        }  # fmt: skip
        if "seconds_split" in counted[0]:
            phases = {
                k: float(np.median([r["seconds_split"][k] for r in counted])) for k in counted[0]["seconds_split"]
            }
            compute = sum(value for kind, value in phases.items() if kind not in WAITING)
            run |= {
                "phase_seconds": phases,
                "exposed_seconds": quartiles([sum(r["seconds_split"][k] for k in WAITING) for r in counted]),
                "roofline_seconds": max(compute, wire),
                "bound": "computation" if compute >= wire else "links",
            }
        runs.append(run)
    for run in runs:
        for other in runs:
            if other["recipe"] == BASE:
                run["over_vanilla_dedup"] = run["step_seconds"][1] / other["step_seconds"][1]
                run["settled_over_vanilla_dedup"] = run["settled_seconds"] / other["settled_seconds"]
    return runs


def spread(values: list[float] | None) -> str:
    return "" if values is None else f"{1e3 * values[1]:.1f} ({1e3 * values[0]:.1f}-{1e3 * values[2]:.1f})"


def show(found: dict[str, dict[str, Any]], out: Path, target: Path | None) -> None:
    """Print the table; write the numbers and the picture."""
    head = ["links", "recipe", "step ms", "of vanilla_dedup", "exposed ms", "roofline ms", "MB a step", "settled ms"]
    cells = {way: read(way, result) for way, result in found.items()}
    rows = [
        [run["links"], run["label"], spread(run["step_seconds"]), f"{run.get('over_vanilla_dedup', float('nan')):.2f}",
         spread(run.get("exposed_seconds")), f"{1e3 * run['roofline_seconds']:.1f}" if "bound" in run else "",
         f"{run['bytes'] / 1e6:.0f}", f"{1e3 * run['settled_seconds']:.1f}"]
        for runs in cells.values() for run in runs
    ]  # fmt: skip
    click.echo(as_text((head, rows)))
    for way, result in found.items():
        click.echo(f"{way}: {result['bytes_per_second'] / 1e9:.2f} GB/s a rank, {result['steps']} steps")
        for label, why in result["failed"].items():
            click.echo(f"{way}: {label} left out: {why.strip().splitlines()[-1]}")
        for run in cells[way]:
            if run["recipe"] == "auto" and "settled_over_vanilla_dedup" in run:
                click.echo(f"{way}: auto over {BASE}, settled: {run['settled_over_vanilla_dedup']:.3f}")
    ways = {
        way: {k: result[k] for k in ("bytes_per_second", "steps", "complete", "failed", "asked")}
        for way, result in found.items()
    }
    first = next(iter(found.values()))
    content = {
        "hardware": first["environment"], "ranks": first["ranks"], "provenance": "measured", "ways": ways,
        "runs": [run for runs in cells.values() for run in runs],
    }  # fmt: skip
    for path in (out / "multigpu.json", *([target] if target else [])):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(path, content)
    shown = {way: runs for way, runs in cells.items() if runs}
    if shown:
        with style.settings():
            median = bars(
                shown, lambda run: run["step_seconds"][1], "Step time with a rank a GPU, measured", "seconds a step"
            )
            median.savefig(out / "multigpu.png", dpi=220)


@click.command(help=__doc__)
@click.option("--ranks", default=2, show_default=True, help="GPUs.")
@click.option("--steps", default=40, show_default=True, help="Of each entry.")
@click.option("--entries", default=ENTRIES, show_default=True, help="As --recipes of luffy compare, and peers by name.")
@click.option("--ways", default=",".join(WAYS), show_default=True)
@click.option("--out", default="runs/multigpu", type=click.Path(path_type=Path), show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the numbers here too.")
@click.option("--budget-seconds", default=3600.0, show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--small", is_flag=True, help="A size for the CPU, to try the benchmark itself.")
@click.option(
    "--turn-seconds", default=60.0, show_default=True, help="An entry that takes longer for a turn is left out."
)
@click.option("--only-report", is_flag=True, help="Measure nothing; show what is in --out.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(
    ranks: int, steps: int, entries: str, ways: str, out: Path, target: Path | None, budget_seconds: float, device: str,
    small: bool, only_report: bool, turn_seconds: float, more: tuple[str, ...],
) -> None:  # fmt: skip
    deadline = time.monotonic() + budget_seconds
    chosen = ways.split(",")
    if unknown := [way for way in chosen if way not in WAYS]:
        raise click.ClickException(f"--ways: {', '.join(unknown)} unknown; choose of {', '.join(WAYS)}")
    out.mkdir(parents=True, exist_ok=True)
    files = {way: out / f"{way.replace(' ', '-')}.json" for way in WAYS}
    if not only_report:
        options = options_of(device, ranks, small, out / "entries", more)
        left_out: dict[str, str] = {}
        for i, way in enumerate(chosen):
            # A share of what is left each, so that a slow first way leaves something for the second.
            share = (deadline - time.monotonic()) / (len(chosen) - i)
            measure(way, files[way], entries, steps, options, ranks, turn_seconds, share, left_out)
    found = {way: json.loads(path.read_text()) for way, path in files.items() if path.exists()}
    if not found:
        raise click.ClickException(f"nothing has been measured in {out}")
    show(found, out, target)


if __name__ == "__main__":
    main()
