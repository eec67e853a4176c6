"""`luffy demo`: the case for Luffy on any machine, in about two minutes on two cores.

1. A small model is trained on one rank, from nothing, with a loss that teaches routers to serve a topic with a block of
   experts (docs/research/local_routers.md). On a model whose routers have learnt nothing, no recipe has much to spare.
2. `luffy compare` continues from its weights with each of four recipes, on the same data: as root behind emulated links
   that are as slow for two cores as Ethernet is for a GPU, else over loopback, where bytes alone are compared.
3. One line says what came out.
"""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import click

from luffy.inputs import keep_run_apart
from luffy.report.compare import read_compare
from luffy.report.runs import METRICS_FILE, REPORT_FILE
from luffy.report.verdict import sentence

RECIPES = ("vanilla", "luffy", "luffy_paper", "luffy_max")
# A model that was trained with topics goes on with them; seats that are learnt would take ten steps to come.
ENTRIES = "vanilla;luffy=luffy --seats topic;luffy_paper;luffy_max=luffy_max --seats topic"
RANKS = 4
MODEL = {
    "model": "moe-gpt2-tiny",
    "hidden-size": 64,
    "vocab-size": 1024,
    "sequence-length": 64,
    "device": "cpu",
    "checkpoint-every": 0,
    "keep-checkpoints": 0,
    "eval-every": 0,
}
START = {
    "recipe": "luffy",
    "seats": "topic",
    "topics": RANKS,
    "seat-loss": 1.0,
    "batch-size": 16,
    "lr": 5e-3,
    "eval-batches": 1,
}
COMPARED = {"ranks": RANKS, "batch-size": 64, "lr": 3e-4, "warmup-steps": 0, "eval-batches": 4}


def run_demo(out: Path, data: str, start_steps: int, steps: int, link: str | None, since: float | None) -> None:
    """What `luffy demo` does. since: seconds of the epoch from which the time in the last line is counted.

    Raises UserError for bad options; leaves with the status of a command that failed.
    """
    keep_run_apart(str(out), {"--data": data}, ("--data",))
    since = time.time() if since is None else since
    begin = out / "start"
    shared = MODEL | {"data": data}
    click.echo(f"== {start_steps} steps on one rank, so that routers know topics", err=True)
    _run(["train", *_options(shared | START | {"steps": start_steps, "out": begin}), "--export", "--overwrite",
          "--no-tensorboard"])  # fmt: skip
    named = {"recipes": ENTRIES, "steps": steps, "out": out, "start-weights": begin / "model.safetensors"}
    command = ["compare", *_options(shared | COMPARED | named), "--overwrite", "--no-tensorboard"]
    behind_links = link is not None and _in_lab(command, link, out)
    if not behind_links:
        click.echo(f"== {', '.join(RECIPES)} over loopback; their bytes are compared, not their speed", err=True)
        _run(command)
    click.echo(last_line(out, link if behind_links else None, time.time() - since))


def last_line(folder: Path, link: str | None, seconds: float) -> str:
    """`luffy: ...`: bytes, speed and loss beside vanilla, the page, the time. link: None where nothing was timed."""
    summaries = {s["label"]: s for s in read_compare(folder)}
    first, timed = summaries["vanilla"], link is not None
    found = [f"{name}: {sentence(summaries[name], first, timed)}" for name in ("luffy", "luffy_max")]
    how = f"{RANKS} ranks behind emulated links of {link}" if timed else "speed not compared: emulated links need root"
    return f"{'; '.join(found)} ({how}; {folder / REPORT_FILE}; {seconds:.0f} s since the start)"


def _options(values: dict[str, object]) -> list[str]:
    return [word for name, value in values.items() for word in (f"--{name}", str(value))]


def _luffy(arguments: list[str]) -> int:
    environment = os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run([sys.executable, "-m", "luffy.train.cli", *arguments], env=environment).returncode


def _run(arguments: list[str]) -> None:
    status = _luffy(arguments)
    if status:
        sys.exit(status)  # the command has said why


def _in_lab(command: list[str], link: str, out: Path) -> bool:
    """Whether the comparison ran behind emulated links: not without root, nor where the kernel makes none."""
    from luffy.lab.namespace import missing_capabilities
    from luffy.lab.spec import read_spec

    read_spec(RANKS, link)  # a wrong rate is a mistake, not a reason to go on without
    if sys.platform != "linux" or missing_capabilities():
        return False
    started = time.time()

    def begun(path: Path) -> bool:
        return path.exists() and path.stat().st_mtime >= started

    click.echo(f"== {', '.join(RECIPES)} behind emulated links of {link}", err=True)
    inner = [sys.executable, "-m", "luffy.train.cli", *command]
    status = _luffy(["lab", "--ranks", str(RANKS), "--link", link, "--", *inner])
    if status and any(begun(out / name / METRICS_FILE) for name in RECIPES):
        sys.exit(status)
    if status:
        click.echo("no emulated links on this machine (see above)", err=True)
    return not status
