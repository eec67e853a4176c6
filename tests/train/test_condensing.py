"""Condensation over a run: budgets are held, what is on when, and a resumed run goes on as it would have."""

import shutil
import sys
from pathlib import Path

import pytest
import torch
from luffy.train.condensing import CondenseControl

from luffy.comm import build_mesh
from luffy.condensation import parse_condense
from luffy.errors import UserError
from luffy.exchange import CondenseState
from luffy.testing import run_ranks
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer


def _train(rank: int, options: TrainOptions) -> None:
    Trainer(options, build_mesh(torch.device("cpu"), options.ep_size)).run()


@pytest.mark.parametrize("condense", ["budget:0.3", "paper"])
def test_a_resumed_run_condenses_exactly_as_the_whole_one(small, tmp_path, condense):
    settings = small(recipe="luffy_paper", condense=condense, steps=8, checkpoint_every=4, condense_warmup=1, lr=1e-2)
    run_ranks(_train, 2, TrainOptions(**settings))
    whole = read_metrics(Path(settings["out"], "metrics.jsonl"))
    assert whole[0]["condense"] == {"kept": 1.0}
    assert min(r["condense"]["kept"] for r in whole) < 0.99
    again = tmp_path / "again"
    shutil.copytree(settings["out"], again)
    shutil.rmtree(again / "checkpoints" / "step-00000008")
    run_ranks(_train, 2, TrainOptions(**(settings | {"out": str(again), "resume": True})))
    resumed = read_metrics(again / "metrics.jsonl")
    assert [r["loss"] for r in resumed] == [r["loss"] for r in whole]
    assert [r["condense"] for r in resumed] == [r["condense"] for r in whole]


def test_warm_up_and_end_are_uncondensed_and_bytes_fall_in_between(small):
    settings = small(condense="static:-1", condense_warmup=2, condense_until=0.6, steps=6, sequence_mode="fixed")
    run_ranks(_train, 2, TrainOptions(**settings))
    records = read_metrics(Path(settings["out"], "metrics.jsonl"))
    kept = [r["condense"]["kept"] for r in records]
    assert kept[:2] == [1.0, 1.0] and kept[4:] == [1.0, 1.0] and max(kept[2:4]) < 0.9
    sent = [r["bytes"]["dispatch"] for r in records]
    assert max(sent[2:4]) < 0.6 * min(sent[:2] + sent[4:])


def test_a_budget_is_reached_from_either_side_and_held():
    """An error that grows as the square root of 1 - h, with noise: what was measured of a trained model."""
    for first in (0.999, 0.2):
        state = CondenseState(parse_condense("budget:0.1"), [first, first])
        control = CondenseControl(state, TrainOptions(steps=300))
        state.thresholds = [first, first]
        g, seen = torch.Generator().manual_seed(0), []
        for step in range(300):
            control.before(step)
            error = [(1 - h) ** 0.5 * (0.8 + 0.4 * float(torch.rand((), generator=g))) for h in state.thresholds]
            seen.append(error)
            control.after(5.0, torch.tensor([[100.0, 50.0, 8.0, e * e, 1.0] for e in error]))
        late = torch.tensor(seen[100:])
        assert (late.square().mean(0).sqrt() - 0.1).abs().max() < 0.015


def test_a_budget_of_zero_condenses_nothing_and_no_audit_loosens():
    state = CondenseState(parse_condense("budget:0"), [0.5])
    control = CondenseControl(state, TrainOptions())
    control.before(0)
    control.after(5.0, torch.tensor([[10.0, 9.0, 1.0, 0.5, 1.0]]))
    assert state.thresholds[0] > 1
    state = CondenseState(parse_condense("budget:0.1"), [0.5])
    control = CondenseControl(state, TrainOptions())
    before = state.thresholds[0]
    control.after(5.0, torch.tensor([[10.0, 10.0, 0.0, 0.0, 0.0]]))
    assert state.thresholds[0] < before


def test_a_graph_that_does_not_fit_is_refused_naming_the_mend(small, monkeypatch):
    monkeypatch.setattr(sys.modules["luffy.exchange.condense"], "LARGEST_GRAPH", 10)
    with pytest.raises(Exception, match=r"--condense paper: a graph over .* add ,window=128"):
        run_ranks(_train, 2, TrainOptions(**small(recipe="luffy_paper", steps=1)))


def test_options_are_checked_at_once():
    with pytest.raises(UserError, match="--condense-until 2"):
        TrainOptions(condense_until=2)
    with pytest.raises(UserError, match=r"--condense static:0\.9,centroid: a mean of tokens would tell moe-gpt2-tiny"):
        TrainOptions(condense="static:0.9,centroid")
    TrainOptions(condense="static:0.9,centroid,window=64", model="moe-bert-large-tiny")
    with pytest.raises(UserError, match=r"--condense static:0\.9,correct cannot be combined with --recipe luffy"):
        TrainOptions(recipe="luffy", condense="static:0.9,correct")
    with pytest.raises(UserError, match="cannot read 'window=7'"):
        TrainOptions(condense="static:0.9,window=7")
