"""The cost of attention in a run: one for all ranks, in its files, and the same again after a resume."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from luffy.comm import Comm, build_mesh
from luffy.model.profile import AttentionProfile, Sample
from luffy.plan.cost import AttentionCost, CostFit
from luffy.testing import run_ranks
from luffy.testing.processes import losses
from luffy.train.attention import AttentionFit, agree, plans_weigh_attention
from luffy.train.checkpoint_files import dump_meta, read_meta
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer


def _agree(rank, rates):
    comm = Comm.create(build_mesh(torch.device("cpu")))
    profile = None
    if rates[rank] is not None:
        fit = CostFit(rates[rank], 1e-5 * rank, 0.02, 0.05, 7, 32 * (rank + 1))
        # The prediction of 9 packed tokens is off by half on every rank.
        seconds = 2 * float(fit.seconds(fit.attention_cost(8).sequence_flops(9)))
        profile = AttentionProfile(8, fit, (), (Sample((9,), False, seconds),))
    return agree(profile, comm, "some device", "packed").to_dict()


def test_all_ranks_plan_with_the_fit_of_the_rank_in_the_middle():
    rates = [1e9, 4e9, 2e9]
    answers = run_ranks(_agree, 3, rates)
    assert answers[0] == answers[1] == answers[2]
    fit = AttentionFit.from_dict(answers[0])
    assert (fit.flops_per_second, fit.score_cost, fit.overhead_seconds, fit.num_samples) == (2e9, 96, 2e-5, 7)
    assert fit.packed_max_relative_error == pytest.approx(0.5) and fit.padded_max_relative_error is None
    assert fit.attention_cost(8) == AttentionCost(8, 2e9, 96)


def test_a_rank_without_a_fit_takes_the_others_and_no_fit_at_all_is_the_formula():
    assert {a["flops_per_second"] for a in run_ranks(_agree, 3, [None, 3e9, None])} == {3e9}
    (answer, _) = run_ranks(_agree, 2, [None, None])
    fit = AttentionFit.from_dict(json.loads(json.dumps(answer)))
    assert fit.attention_cost(8) == AttentionCost(8) and fit.num_samples == 0
    assert fit.median_relative_error is None


def _train(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu")))
    trainer.run()
    planner = trainer.runtime.planner
    return None if planner is None else planner.attention


def _read(out, name):
    return json.loads(Path(out, name).read_text())


@pytest.mark.slow
@pytest.mark.parametrize("layout", ["packed", "padded"])
def test_a_resumed_run_plans_with_the_same_cost_and_repeats_its_losses_exactly(small, tmp_path, layout):
    settings = small(recipe="luffy_paper", layout=layout, profile_attention=True, keep_checkpoints=5)
    costs = run_ranks(_train, 2, TrainOptions(**settings))
    whole = read_metrics(Path(settings["out"], "metrics.jsonl"))
    assert sum(r["plan"]["moved_share"] for r in whole) > 0
    again = tmp_path / "again"
    shutil.copytree(settings["out"], again)
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    resumed = run_ranks(_train, 2, TrainOptions(**(settings | {"out": str(again), "resume": True})))
    assert losses(again) == [r["loss"] for r in whole]
    # A second measurement would never agree to the last bit.
    assert len(set(costs + resumed)) == 1 and costs[0].hidden_size == 32
    fits = [
        _read(out, name)["attention_fit"]
        for out in (settings["out"], again)
        for name in ("config.json", "summary.json")
    ]
    assert all(fit == fits[0] for fit in fits)
    assert fits[0]["flops_per_second"] == costs[0].flops_per_second and fits[0]["layout"] == layout
    # Planned with a cost that came from the checkpoint, even an odd one, on every rank.
    meta = again / "checkpoints" / "step-00000003" / "meta.json"
    content = read_meta(meta.parent)
    content["attention_fit"] |= {"flops_per_second": 123.0, "score_cost": 2048}
    meta.write_text(dump_meta(content))
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    options = TrainOptions(**(settings | {"out": str(again), "resume": True}))
    assert run_ranks(_train, 2, options) == [AttentionCost(32, 123.0, 2048)] * 2
    # Of another device: measured again.
    content["attention_fit"]["device_name"] = "another device"
    meta.write_text(dump_meta(content))
    shutil.rmtree(again / "checkpoints" / "step-00000006")
    first, second = run_ranks(_train, 2, options)
    assert first == second and first.flops_per_second != 123.0
    assert losses(again) == pytest.approx([r["loss"] for r in whole], rel=1e-10)


def test_nothing_is_measured_where_it_would_change_nothing(small):
    def weighs(ep_size=2, **changes):
        return plans_weigh_attention(TrainOptions(**small(**changes)), ep_size)

    assert weighs(recipe="luffy_paper") and weighs(recipe="luffy_paper", layout="padded")
    assert not weighs(recipe="vanilla_dedup") and not weighs(recipe="luffy")  # plan nothing in a layer
    assert not weighs(recipe="netmoe")  # keeps the number of sequences on each rank
    assert not weighs(recipe="luffy_paper", sequence_mode="fixed")  # equal lengths
    assert not weighs(recipe="luffy_paper", ep_size=1)


def test_it_can_be_turned_off(small):
    settings = small(recipe="luffy_paper", steps=1, profile_attention=False)
    assert run_ranks(_train, 2, TrainOptions(**settings)) == [AttentionCost(32)] * 2
    assert _read(settings["out"], "config.json")["attention_fit"] is None
    assert "attention_fit" not in _read(settings["out"], "summary.json")
