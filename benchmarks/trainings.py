"""What questions of quality share: one model trained many times, several trainings side by side on one or more GPUs.

Every training is a `luffy train` of its own (or a script that does as it does), in a process of its own with a folder
of its own. When the time is over no further one begins; what is finished is for the caller to keep and to skip.
"""

from __future__ import annotations

import os
import queue
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import click

MODEL = [
    "--model", "moe-gpt2", "--layers", "6", "--hidden-size", "512", "--heads", "8", "--experts", "16",
    "--expert-hidden-size", "2048", "--max-sequence-length", "512", "--vocab-size", "8192",
]  # fmt: skip
LEARNING_RATE = 1e-3
LUFFY = [sys.executable, "-m", "luffy.train.cli"]


def training(
    size: list[str], out: Path, *, data: str, device: str, seed: int, steps: int, batch_size: int, sequence_length: int
) -> list[str]:
    """The options of `luffy train` that all trainings of a question have; recipe and ranks are the caller's."""
    options = [*size, "--data", data, "--device", device, "--seed", str(seed), "--steps", str(steps)]
    options += ["--batch-size", str(batch_size), "--sequence-length", str(sequence_length)]
    options += ["--lr", str(LEARNING_RATE), "--eval-every", str(max(1, steps // 10)), "--eval-batches", "8"]
    return [*options, "--keep-checkpoints", "0", "--no-tensorboard", "--out", str(out), "--overwrite"]


def fingerprint(data: str) -> str:
    """Names and sizes of the files of a corpus: losses on another corpus, or another held-out part, do not compare."""
    path = Path(data)
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    return ", ".join(f"{p.name} ({p.stat().st_size} bytes)" if p.exists() else data for p in files)


def failure(command: list[str], variables: dict[str, str]) -> str | None:
    """Run a command to its end: None, or why it failed: the first error that it named, or the last it said."""
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | variables)
    if done.returncode == 0:
        return None
    # torchrun adds pages about itself behind a rank's own words.
    named = re.search(r"^.*(?:Error|error): .*$", done.stderr, re.MULTILINE)
    return named[0].strip() if named else done.stderr.strip()[-300:] or f"status {done.returncode}"


def side_by_side(
    work: Sequence[tuple[str, Callable[[dict[str, str]], str]]], *, jobs: int, gpus: int, seconds: float
) -> None:
    """Do all `work`, `jobs` at a time, spread over `gpus` GPUs (0: as they are seen); say what became of each, in turn.

    work: names, and what to call with the environment variables that choose a GPU; it gives back what became of it.
    seconds: nothing begins after so long.
    """
    began = time.monotonic()
    places: queue.Queue[int] = queue.Queue()
    for place in range(jobs):
        places.put(place)
    shown = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = shown.split(",") if shown else [str(i) for i in range(gpus)]
    if gpus > len(devices):
        raise click.ClickException(f"--gpus {gpus}: CUDA_VISIBLE_DEVICES shows {len(devices)}")

    def one(name: str, do: Callable[[dict[str, str]], str]) -> str:
        place = places.get()
        try:
            if time.monotonic() - began > seconds:
                return f"{name}: no time left"
            return f"{name}: {do({'CUDA_VISIBLE_DEVICES': devices[place % gpus]} if gpus else {})}"
        finally:
            places.put(place)

    with ThreadPoolExecutor(jobs) as pool:
        for line in pool.map(lambda item: one(*item), work):
            click.echo(f"{time.monotonic() - began:6.0f} s  {line}")
