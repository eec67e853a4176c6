"""A training run from the outside: check what can be checked, launch the ranks, report."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from luffy.comm import Mesh
from luffy.data.corpus import list_source_files
from luffy.lab.place import check_ranks, current_lab
from luffy.report.units import format_bytes, format_loss, format_rate
from luffy.train.heartbeat import watching
from luffy.train.launch import choose_device, join_world, launch, under_torchrun
from luffy.train.options import TrainOptions
from luffy.train.outfolder import check_out, take_out
from luffy.train.ranklog import open_log
from luffy.train.restart import Restarts
from luffy.train.runfile import write_run_file


def start(options: TrainOptions, work: Callable[[Any], None] | None = None) -> None:
    """Run `luffy train`, or another `work` of each rank. UserError before any starts for what can be seen by then."""
    work = work or _rank
    if under_torchrun():
        launch(work, (options,), 0)
        return
    lab = current_lab()
    if lab is not None:
        options = replace(options, ranks=check_ranks(lab, options.ranks))
    choose_device(options.device, options.backend, options.ranks)
    options.check_world(options.ranks)
    list_source_files(options.data)
    check_out(options)
    launch(work, (options,), options.ranks, Restarts(options))


def _rank(options: TrainOptions) -> None:
    from luffy.train.trainer import Trainer

    train_and_report(Trainer, options)


def join(options: TrainOptions) -> tuple[TrainOptions, Mesh]:
    """Join the world and take --out. Ranks that a launcher (torchrun too) started again continue the run."""
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT") or 0) > 0
    mesh = join_world(
        options.device, options.backend, options.ep_size, options.ranks_per_node, options.timeout_seconds,
        options.interface,
    )  # fmt: skip
    from luffy.train.checkpoint import everyone  # a second of loading that the launcher does not need

    def take() -> bool:
        goes_on = take_out(options, restarted)
        write_run_file(options)
        return goes_on

    if everyone(mesh, take, only_first=True):
        options = replace(options, resume=True, overwrite=False)
    open_log(options.out, mesh.rank)
    return options, mesh


def train_and_report(make: Callable[[Any, Mesh], Any], options: TrainOptions, **more: Path) -> None:
    """Join the world, train with the trainer that `make` makes, and say where everything is; `more`: what else."""
    options, mesh = join(options)
    with watching(options, mesh):
        summary = make(options, mesh).run()
    if summary is None:
        return
    from luffy.report.html import write_run_report

    page = write_run_report(options.out)
    loss = "" if summary.valid_loss is None else f", held-out loss {format_loss(summary.valid_loss)}"
    speed, moved = format_rate(summary.tokens_per_second, "tokens"), format_bytes(sum(summary.bytes.values()))
    click.echo(f"{summary.steps} steps, {speed}, {moved} moved{loss}")
    for label, path in (
        ("metrics", Path(options.out) / "metrics.jsonl"),
        ("curve", Path(options.out) / "loss.png"),
        ("report", page),
        ("tensorboard", Path(options.out) / "tensorboard"),
        ("checkpoints", Path(options.out) / "checkpoints"),
        *more.items(),
    ):
        if Path(path).exists():
            click.echo(f"{label + ':':<13}{path}")
