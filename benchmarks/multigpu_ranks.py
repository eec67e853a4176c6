"""One rank of benchmarks/multigpu.py: every entry's trainer in one process group, a few steps each in turn.

To start processes, GPUs and NCCL takes longer than forty steps of an entry do. So all models are made first, side by
side in memory, and then take turns, round after round: a machine that slows down in between slows all alike, and
whenever the time is over all have made as many steps. The first step of a turn follows another entry's last optimizer
step, which a GPU may still be busy with, and the first turn compiles and allocates; neither is counted.

An entry that cannot be made, or fails on all ranks alike, is left out, and the report says why. One that fails on some
ranks alone, or takes longer than --turn-seconds for a turn, leaves others waiting for ever: then the ranks note which
it was and end, and benchmarks/multigpu.py begins again without it. After every round rank 0 writes what has been
measured, so that a job which is ended loses no more than a round.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch
import torch.distributed as dist

from luffy.comm import Mesh
from luffy.errors import UserError
from luffy.train.entries import Entry, parse_entries
from luffy.train.launch import join_world
from luffy.train.metrics import describe_machine, write_json_atomic
from luffy.train.option_parser import parse_options
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.peers.common import PeerRun, check_options, check_package
from benchmarks.peers.counting import ByteCounter
from benchmarks.peers.registry import MODULES, get_peer

TURN = 5  # steps of an entry in a round; all but the first are counted
Runner = Any  # a Trainer or a PeerRun: what has a `train_step`


def entries_of(text: str) -> list[Entry]:
    """Recipes, and peers by their names, in the order in which they take turns."""
    parts = [part.strip() for part in text.split(";") if part.strip()]
    recipes = parse_entries(";".join(part for part in parts if part not in MODULES))
    return [*recipes, *(Entry(part, part) for part in parts if part in MODULES)]


def link_rate(mesh: Mesh, num_bytes: int) -> float:
    """Bytes a second that each rank sends while all do: the median of nine all-to-alls of `num_bytes`, slowest rank."""
    n, device = mesh.world_size, mesh.device
    mine = torch.zeros(n, num_bytes // n, dtype=torch.uint8, device=device)
    theirs, seconds = torch.empty_like(mine), []
    for _ in range(12):
        _settle(device)
        begin = time.perf_counter()
        dist.all_to_all_single(theirs, mine)
        _settle(device)
        seconds.append(time.perf_counter() - begin)
    slowest = torch.tensor(sorted(seconds[3:])[4], device=device)
    dist.all_reduce(slowest, dist.ReduceOp.MAX)
    return mine.nbytes * (n - 1) / n / float(slowest)


def _settle(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


@contextmanager
def bounded(label: str, seconds: float, note: Path) -> Iterator[None]:
    """End this process if the block takes longer, with a word at `note` and where each thread was on stderr."""

    def end() -> None:
        if not note.exists():
            write_json_atomic(note, {"label": label, "why": f"not over after {seconds:.0f} s"})
        faulthandler.dump_traceback(file=sys.stderr)
        os._exit(3)

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class Contest:
    """All entries on this rank. notes: where ranks leave word of what ended them."""

    def __init__(
        self, entries: list[Entry], shared: TrainOptions, mesh: Mesh, counter: ByteCounter, notes: Path,
        turn_seconds: float,
    ) -> None:  # fmt: skip
        self.mesh, self.counter = mesh, counter
        notes.mkdir(parents=True, exist_ok=True)
        self.note, self.turn_seconds = notes / f"rank{mesh.rank}.json", turn_seconds
        self.runners: dict[str, Runner] = {}
        self.records: dict[str, list[dict[str, Any]]] = {}
        self.failed: dict[str, str] = {}
        self._measured: Trainer | None = None  # knows what attention and experts cost, for all
        for entry in entries:
            began = time.monotonic()
            self._attempt(entry.label, lambda entry=entry: self._make(entry, shared))
            self.say(f"{entry.label}: made in {time.monotonic() - began:.1f} s")

    def say(self, text: str) -> None:
        if self.mesh.rank == 0:
            click.echo(text, err=True)

    def _make(self, entry: Entry, shared: TrainOptions) -> None:
        out = Path(shared.out) / entry.folder
        out.mkdir(parents=True, exist_ok=True)
        if entry.recipe in MODULES:
            peer = get_peer(entry.recipe)
            options = replace(shared, recipe="vanilla", out=str(out))
            if entry.recipe == "hf_ep":  # whose gradients FSDP2 reduces in float32
                options = replace(options, gradient_dtype="model")
            check_package(peer)
            check_options(peer, options)
            self.runners[entry.label] = PeerRun(peer, options, self.mesh, self.counter)
        else:
            trainer = Trainer(replace(entry.apply(shared), out=str(out)), self.mesh)
            if self._measured is not None:
                trainer.attention_fit = self._measured.attention_fit
                trainer.expert_flops = self._measured.expert_flops
            trainer.prepare()
            self._measured = self._measured or trainer
            self._measured.attention_fit = self._measured.attention_fit or trainer.attention_fit
            self._measured.expert_flops = self._measured.expert_flops or trainer.expert_flops
            self.runners[entry.label] = trainer
        self.records[entry.label] = []

    def _attempt(self, label: str, do: Any) -> None:
        """Do a thing with an entry; leave the entry out, everywhere, if it fails anywhere."""
        error = ""
        with bounded(label, self.turn_seconds, self.note):
            try:
                do()
            except UserError as mistake:
                error = str(mistake)
            except Exception:
                error = traceback.format_exc()[-1500:]
            if error:
                write_json_atomic(self.note, {"label": label, "why": error})
            ill = torch.tensor(int(bool(error)), device=self.mesh.device)
            dist.all_reduce(ill)
            alike = int(ill)
        self.note.unlink(missing_ok=True)
        if alike:
            self.failed[label] = error or "it failed on another rank"
            self.runners.pop(label, None)

    def round(self) -> None:
        for label in list(self.runners):
            began = time.monotonic()
            self._attempt(label, lambda label=label: self._turn(label))
            if len(self.records[label]) == TURN:
                held = (
                    f", {torch.cuda.memory_reserved() / 1e9:.0f} GB held by all"
                    if self.mesh.device.type == "cuda"
                    else ""
                )
                self.say(f"{label}: its first {TURN} steps in {time.monotonic() - began:.1f} s{held}")

    def _turn(self, label: str) -> None:
        runner = self.runners[label]
        self.counter.take()  # what others sent
        for i in range(TURN):
            record = runner.train_step()
            kept = {
                k: record[k] for k in ("loss", "seconds", "tokens", "bytes", "seconds_split", "auto") if k in record
            }
            counted = i > 0 and len(self.records[label]) >= TURN
            self.records[label].append(kept | {"counted": counted})


@click.command()
@click.option("--entries", required=True)
@click.option("--steps", type=int, required=True)
@click.option("--until", default=float("inf"), help="Seconds since the epoch: begin no round that would end later.")
@click.option("--options", required=True, help="Of luffy train, in one string.")
@click.option("--rate-bytes", type=int, required=True)
@click.option("--turn-seconds", default=60.0, show_default=True)
@click.option("--json", "target", required=True, type=click.Path(path_type=Path))
def main(
    entries: str, steps: int, until: float, options: str, rate_bytes: int, turn_seconds: float, target: Path
) -> None:
    fixed = {"steps": steps, "eval_every": 0, "tensorboard": False}
    shared = TrainOptions(**parse_options(options, tuple(fixed), "multigpu"), **fixed)
    counter = ByteCounter().install()
    mesh = join_world(shared.device, shared.backend, None, None, 600.0)
    rate = link_rate(mesh, rate_bytes)
    contest = Contest(entries_of(entries), shared, mesh, counter, target.with_suffix(".notes"), turn_seconds)
    done, took = 0, 0.0
    while done < steps:
        began = time.time()
        over = torch.tensor(int(began + took > until), device=mesh.device)
        dist.broadcast(over, 0)
        if int(over):
            break
        contest.round()
        done, took = done + TURN, time.time() - began
        contest.say(f"{done} steps of each, the last {TURN} in {took:.1f} s")
        if mesh.rank == 0:
            write_json_atomic(target, {
                "environment": describe_machine(mesh.device.type), "ranks": mesh.world_size, "steps": done,
                "complete": done >= steps, "bytes_per_second": rate, "failed": contest.failed,
                "entries": contest.records, "asked": [entries, steps, options],
            })  # fmt: skip
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
