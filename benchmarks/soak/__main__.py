"""`make soak`: a small training under random faults for a quarter of an hour; ends with 1 if a count is not zero.

    python -m benchmarks.soak --minutes 15 --seed 1 --out runs/soak

Each life is a run of two ranks that is disturbed several times, continued, and compared with an undisturbed one to the
bit. Full disks need root for a small disk; cut and slowed links need it for `luffy lab`. Without, they are left out,
and the last lines say so.
"""

from __future__ import annotations

import copy
import json
import random
import shutil
import subprocess
import sys
import sysconfig
import time
from contextlib import suppress
from pathlib import Path

import click

from benchmarks.soak.faults import LAB, LOCAL, choose, fill_the_disk, small_disk
from benchmarks.soak.life import Life, Score
from luffy.lab.namespace import missing_capabilities
from luffy.testing.processes import LUFFY
from luffy.train.metrics import read_metrics

TIMEOUT = 5
FAULTS_A_LIFE = 6


def corpus(folder: Path) -> Path:
    """About 150 KB of the standard library."""
    path = folder / "code.jsonl"
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    texts = [json.dumps({"text": p.read_text(encoding="utf-8", errors="ignore")[:2500]}) for p in sources]
    path.write_text("\n".join(texts), encoding="utf-8")
    return path


def options(data: Path, out: Path, steps: int) -> list[str]:
    settings = {
        "data": data, "cache-dir": data.parent / "cache", "out": out, "recipe": "vanilla_dedup", "device": "cpu",
        "vocab-size": 300, "layers": 2, "hidden-size": 32, "heads": 2, "experts": 4, "expert-hidden-size": 32,
        "sequence-length": 32, "batch-size": 4, "steps": steps, "eval-every": 0, "eval-batches": 1, "ranks": 2,
        "checkpoint-every": 3, "keep-checkpoints": 3, "timeout-seconds": TIMEOUT, "max-restarts": 1000,
    }  # fmt: skip
    return ["--no-tensorboard", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


@click.command()
@click.option("--minutes", default=15.0, show_default=True, help="How long to make trouble.")
@click.option("--steps", default=300, show_default=True, help="Of each run: about half a minute's worth is good.")
@click.option("--seed", default=0, show_default=True, help="Of the faults and their moments.")
@click.option("--only", type=click.Choice(["local", "disk", "lab"]), help="Lives of this kind alone.")
@click.option("--out", default=Path("runs/soak"), type=click.Path(path_type=Path), help="Folder; emptied first.")
def main(minutes: float, steps: int, seed: int, only: str | None, out: Path) -> None:
    """Train, disturb, continue, compare; print what was counted."""
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    out = out.resolve()
    temporary = Path("/tmp") / f"luffy-soak-{seed}"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    data, dice, score = corpus(out), random.Random(seed), Score()
    reference = out / "undisturbed"
    subprocess.run([*LUFFY, "train", *options(data, reference, steps)], check=True, capture_output=True)
    losses = [r["loss"] for r in read_metrics(reference / "metrics.jsonl")]
    lab = [] if missing_capabilities() else ["lab", "--ranks", "2", "--link", "200mbit", "--"]
    disk = out / "disk"
    has_disk = small_disk(disk)
    end, number = time.monotonic() + 60 * minutes, 0
    try:
        while time.monotonic() < end:
            number += 1
            kind = "disk" if has_disk and number % 4 == 2 else "lab" if lab and number % 4 == 0 else "local"
            kind = only or kind
            folder = (disk if kind == "disk" else out) / f"life-{number}"
            life = Life(folder, options(data, folder, steps), score, temporary, out, lab if kind == "lab" else [])
            live(life, kind, dice, losses, end)
            shutil.rmtree(folder, ignore_errors=True)
            faults = sum(score.faults.values())
            click.echo(f"life {number} ({kind}): {faults} faults, {score.wrong_ones()} wrong", err=True)
    finally:
        if has_disk:
            subprocess.run(["umount", "-l", str(disk)])
        shutil.rmtree(temporary, ignore_errors=True)
    left_out = [w for w, there in (("full disks", has_disk), ("links", bool(lab))) if not there]
    report(score, number, left_out, out)


def live(life: Life, kind: str, dice: random.Random, losses: list[float], end: float) -> None:
    life.out.parent.mkdir(parents=True, exist_ok=True)
    for _ in range(FAULTS_A_LIFE):
        if not life.running:
            life.start()
        if not life.running or time.monotonic() > end:
            break
        time.sleep(dice.uniform(0, 1.0))
        if not life.running:  # it came to its end before the fault
            break
        if kind == "disk":
            name, fault = "disk full", fill_the_disk
        else:
            name, fault = choose(LAB if kind == "lab" else LOCAL, dice)
        if len(life.ranks) < 2:
            continue
        before = copy.deepcopy(life.score)
        life.score.faults[name] += 1
        assert life.process is not None
        process = life.process
        with suppress(IndexError, FileNotFoundError, ProcessLookupError):
            fault(life, dice)
        if process.poll() == 0 and life.process is process:  # it ended by itself before the fault came
            life.score.__dict__.update(before.__dict__)
            break
        life.look()
    life.finish(losses)


def report(score: Score, lives: int, left_out: list[str], out: Path) -> None:
    total = sum(score.faults.values())
    click.echo(f"{total} faults in {lives} runs; {score.resumes} resumes by hand; {score.ends} ends compared")
    for name, count in score.faults.most_common():
        click.echo(f"  {count:4}  {name}")
    click.echo(f"slowest naming of a late rank: {score.slowest_naming_seconds:.1f} s (timeout {TIMEOUT} s)")
    for what, found in score.wrong.items():
        click.echo(f"  {len(found):4}  {what}")
        for detail in found[:5]:
            click.echo("        " + detail.replace("\n", "\n        "))
    if left_out:
        click.echo(f"left out, since they need root: {', '.join(left_out)}")
    counts = {"faults": score.faults, "resumes": score.resumes, "ends": score.ends, "wrong": score.wrong}
    (out / "soak.json").write_text(json.dumps(counts, indent=1))
    sys.exit(any(score.wrong.values()) or total == 0)


if __name__ == "__main__":
    main()
