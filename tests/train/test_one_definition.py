"""Held-out loss, speed and bytes of a run are the same numbers wherever they are shown, after a resume too."""

from dataclasses import replace

import pytest
import torch

from luffy.comm import build_mesh
from luffy.report.compare_table import text_tables
from luffy.report.figures import loss_figure
from luffy.report.html import tiles
from luffy.report.runs import read_run, tokens_per_second
from luffy.report.summaries import cumulative, set_side_by_side, summarise
from luffy.report.units import format_bytes, format_count, format_loss, format_rate
from luffy.testing import run_ranks
from luffy.train.options import TrainOptions
from luffy.train.run import train_and_report
from luffy.train.trainer import Trainer


def _train(rank, options):
    Trainer(options, build_mesh(torch.device("cpu"))).run()


def _train_and_say(rank, options):
    train_and_report(Trainer, options)


def test_one_definition_each(small, capfd):
    first = TrainOptions(**small(steps=8, eval_every=2, checkpoint_every=4, rehome_every=4, recipe="netmoe"))
    run_ranks(_train, 2, first)
    capfd.readouterr()
    run_ranks(_train_and_say, 2, replace(first, resume=True, steps=12))
    said = capfd.readouterr()
    run = read_run(first.out)
    summary = run.summary
    loss, speed = format_loss(summary["valid_loss"]), format_rate(summary["tokens_per_second"], "tokens")
    total = sum(summary["bytes"].values())
    moved = format_bytes(total)

    last = next(line for line in said.err.splitlines() if line.startswith("train 12/12"))
    assert f"held-out loss {loss}" in last and f"  {speed}  " in last and f"  {moved} moved" in last
    assert f"12 steps, {speed}, {moved} moved, held-out loss {loss}" in said.out
    shown = {what: (value, beside) for what, value, beside in tiles(run)}
    assert shown["held-out loss"][0] == loss and shown["speed"][0] == speed
    assert shown["bytes per step"][0] == format_bytes(total / 12) and moved in shown["bytes per step"][1]
    figure = loss_figure(run, "steps")
    words = " ".join(t.get_text() for t in [*figure.texts, *(t for a in figure.axes for t in [a.title, *a.texts])])
    assert f"held-out {loss}" in words

    both = [summarise("one", [run]), summarise("two", [run])]
    set_side_by_side(both, [[run], [run]])
    assert both[0]["valid_loss"] == summary["valid_loss"] == both[0]["curve"]["valid_loss"][-1]
    assert both[0]["tokens_per_second"] == summary["tokens_per_second"]
    assert sum(both[0]["step_bytes"].values()) == pytest.approx(total / 12)
    assert cumulative(run)[1][-1] == both[0]["curve"]["bytes"][-1] == total
    tables = text_tables(both)
    assert loss in tables and format_count(summary["tokens_per_second"]) in tables


def test_speed_leaves_the_warm_up_out():
    assert tokens_per_second([10] * 8, [9.0, 9.0, *[1.0] * 6]) == 10
    assert tokens_per_second([], []) == 0.0
