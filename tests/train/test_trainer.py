"""Runs on real ranks: resume bit for bit, another number of ranks, data parallel groups, recurrence, NaN."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.plan.replay import spread_evenly
from luffy.plan.trace import RoutingTrace
from luffy.testing import run_ranks
from luffy.testing.processes import losses
from luffy.train.export import load_safetensors
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.rehoming import num_recorded
from luffy.train.trainer import Trainer


def _train(rank, options):
    mesh = build_mesh(torch.device("cpu"), options.ep_size)
    trainer = Trainer(options, mesh)
    trainer.run()
    return {n: p.detach().sum().item() for n, p in trainer.model.named_parameters()}


def _run(settings, world):
    options = TrainOptions(**settings)
    run_ranks(_train, world, options)
    return losses(options.out)


def _copy_with_checkpoint(out, target, step):
    """A run folder as it was when `step` had been saved."""
    shutil.copytree(out, target)
    for path in Path(target, "checkpoints").iterdir():
        if path.name != f"step-{step:08d}":
            shutil.rmtree(path)
    return str(target)


def test_resume_continues_exactly_and_at_other_numbers_of_ranks(small, tmp_path):
    settings = small(keep_checkpoints=5)
    whole = _run(settings, 2)
    assert whole[-1] < whole[0]
    again = _run(settings | {"out": _copy_with_checkpoint(settings["out"], tmp_path / "same", 3), "resume": True}, 2)
    assert again == whole  # bit for bit: the steps before the checkpoint kept, those after it computed again
    for world, ep_size in ((4, None), (1, None), (4, 2)):
        out = _copy_with_checkpoint(settings["out"], tmp_path / f"at-{world}-{ep_size}", 3)
        other = _run(settings | {"out": out, "resume": True, "ep_size": ep_size}, world)
        assert other == pytest.approx(whole, rel=1e-10)


@pytest.mark.slow
def test_the_mesh_and_the_number_of_ranks_do_not_change_the_run(small, tmp_path):
    def run(world, **changes):
        return _run(
            small(checkpoint_every=0, accumulate=2, steps=4, **changes) | {"out": str(tmp_path / f"{world}-{changes}")},
            world,
        )

    one = run(1)
    assert run(4, ep_size=2) == pytest.approx(one, rel=1e-10)
    assert run(4, recipe="vanilla", layout="padded", recompute=True) == pytest.approx(one, rel=1e-10)
    for form in ("bfloat16", "int8"):
        for ep_size in (None, 1):  # 1: experts have copies, whose gradients are summed as well
            compressed = run(2, gradient_dtype=form, ep_size=ep_size)
            assert compressed == pytest.approx(one, rel=2e-3)
            assert compressed != pytest.approx(one, rel=1e-9)


def test_micro_batches_do_not_change_what_is_held_out(small, tmp_path):
    found = []
    for name, changes in {"whole": {}, "two": {"accumulate": 2}, "halves": {"overlap": True}}.items():
        settings = small(checkpoint_every=0, steps=2, balance_loss=0.0, **changes) | {"out": str(tmp_path / name)}
        _run(settings, 2)
        found.append(json.loads((tmp_path / name / "summary.json").read_text())["valid_loss"])
    assert found[1:] == pytest.approx([found[0]] * 2, rel=1e-10)


@pytest.mark.slow
def test_recurrence_and_masked_models_resume_exactly(small, tmp_path):
    for model, extra in (
        (
            "moe-transformer-xl-tiny",
            {"memory_length": 16, "sequence_mode": "streams", "accumulate": 2, "batch_size": 4},
        ),
        ("moe-bert-large-tiny", {"bias_update_rate": 0.01}),
    ):
        settings = small(model=model, out=str(tmp_path / model), keep_checkpoints=5, **extra)
        whole = _run(settings, 2)
        copy = _copy_with_checkpoint(settings["out"], tmp_path / f"{model}-again", 3)
        assert _run(settings | {"out": copy, "resume": True}, 2) == whole


def _poisoned(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu")))
    if rank == 1:
        with torch.no_grad():
            trainer.model.moe_layers[1].router.weight[0, 0] = float("nan")
    before = trainer.model.token_embedding.weight.clone()
    with pytest.raises(UserError, match=r"step 1: .*weight blocks.1.moe.router.weight is not finite.*--lr"):
        trainer.train_step()
    assert torch.equal(before, trainer.model.token_embedding.weight)
    return True


def test_a_nan_in_one_ranks_router_stops_all_ranks_and_names_the_layer(small):
    assert run_ranks(_poisoned, 2, TrainOptions(**small())) == [True, True]


def _foreign_checkpoint(rank, options):
    with pytest.raises(UserError) as caught:
        Trainer(options, build_mesh(torch.device("cpu"))).run()
    return str(caught.value)


def test_a_foreign_checkpoint_is_refused_in_one_line(small):
    settings = small(steps=1)
    _run(settings, 2)
    resume = TrainOptions(**(settings | {"resume": True, "steps": 2}))
    for options, message in (
        (replace(resume, hidden_size=64), "other settings (hidden_size"),
        (replace(resume, seed=5), "--seed 0, not 5"),
    ):
        answers = run_ranks(_foreign_checkpoint, 2, options)
        assert all(message in a and "\n" not in a for a in answers), answers


def test_export_holds_every_expert_of_every_rank(small):
    settings = small(steps=1, export=True, keep_checkpoints=0)
    _run(settings, 2)
    path = Path(settings["out"], "model.safetensors")
    with safe_open(str(path), "pt") as f:
        assert f.get_tensor("blocks.0.moe.experts.w_in").shape == (4, 32, 32)
        assert "luffy_config" in f.metadata()
    assert not Path(settings["out"], "checkpoints").exists()


def _first_loss(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu")))
    if options.start_weights is None:
        return None
    load_safetensors(trainer.model, Path(options.start_weights))
    return trainer.train_step()["loss"]


def test_exported_weights_begin_another_run_at_any_number_of_ranks(small, tmp_path):
    settings = small(steps=3, export=True, recipe="luffy", rehome_every=2, lr=0.0, experts=8, min_lr=1.0)
    losses = _run(settings, 2)
    weights = str(Path(settings["out"], "model.safetensors"))
    again = small(steps=3, start_weights=weights, out=str(tmp_path / "again"), experts=8, seed=0)
    for world in (1, 4):
        for answer in run_ranks(_first_loss, world, TrainOptions(**again)):
            assert answer == pytest.approx(losses[0], rel=1e-10)
    # Their routers are trained, so experts find their homes before the first step.
    moved = small(steps=2, start_weights=weights, out=str(tmp_path / "moved"), experts=8, recipe="luffy", lr=0.0)
    assert _run(moved, 2) == pytest.approx(losses[:2], rel=1e-10)
    records = read_metrics(tmp_path / "moved" / "metrics.jsonl")
    assert "rehoming" in records[0] and "rehoming" not in records[1]
    with pytest.raises(AssertionError, match=r"--start-weights .*b_in is .* give the model options"):
        run_ranks(_first_loss, 1, TrainOptions(**again | {"expert_hidden_size": 16}))
    with pytest.raises(AssertionError, match=r"--start-weights .* lacks blocks.2"):
        run_ranks(_first_loss, 1, TrainOptions(**again | {"layers": 3}))
    Path(weights).write_bytes(Path(weights).read_bytes()[:1000])
    with pytest.raises(AssertionError, match="cannot be read"):
        run_ranks(_first_loss, 1, TrainOptions(**again))


def test_the_summary_and_the_record_agree(small):
    settings = small(steps=2)
    _run(settings, 2)
    records = read_metrics(Path(settings["out"], "metrics.jsonl"))
    assert all(r["bytes"]["dispatch"] == r["bytes"]["dispatch_backward"] > 0 for r in records)
    assert all(r["bytes"]["combine"] == r["bytes"]["dispatch"] for r in records)  # sequences stay
    # The split is a mean over ranks and `seconds` is the first rank's: on a busy machine neither bounds the other.
    assert all(min(r["seconds_split"].values()) >= 0 < sum(r["seconds_split"].values()) for r in records)
    assert all(r["seconds_split"]["gradients"] > 0 for r in records)  # the wait of the last bucket is told apart
    traffic = json.loads(Path(settings["out"], "summary.json").read_text())["traffic"]
    rows = ("dispatch", "combine", "dispatch_backward", "combine_backward", "experts")
    sent = sum(r["bytes"][kind] for r in records for kind in rows)
    assert traffic["steps"] == 2 and len(traffic["bytes"]) == 2
    assert traffic["bytes"][0][1] + traffic["bytes"][1][0] == sent


def test_a_run_goes_on_with_another_recipe(small, tmp_path):
    """One that learns seats has a predictor to keep, one that does not leaves it aside; losses are what they were."""
    whole = _run(small(recipe="luffy", keep_checkpoints=9), 2)
    for there, then in (("run", "vanilla_dedup"), ("vanilla_dedup", "luffy")):
        out = _copy_with_checkpoint(tmp_path / there, tmp_path / then, 3)
        assert _run(small(recipe=then, keep_checkpoints=9, out=out, resume=True), 2) == pytest.approx(whole, rel=1e-10)


def test_a_rehoming_records_as_many_sequences_as_it_needs_and_no_more():
    assert [num_recorded(n, 16) for n in (8, 42, 64, 96, 128, 1000)] == [6, 6, 4, 4, 2, 2]
    assert num_recorded(128, 64) == 6 and num_recorded(600, 64) == 2


@pytest.mark.slow
def test_rehoming_changes_where_experts_live_and_nothing_else(small, tmp_path):
    """Experts so small that moving pays within steps; resumed after it, before it, and at another number of ranks."""
    settings = small(recipe="luffy", rehome_every=2, expert_hidden_size=2, experts=8, steps=7, keep_checkpoints=9)
    settings |= {"checkpoint_every": 1, "export": True, "trace_every": 6}
    whole = _run(settings, 4)
    records = read_metrics(Path(settings["out"], "metrics.jsonl"))
    moves = {r["step"]: r["rehoming"] for r in records if "rehoming" in r}
    assert list(moves) == [2, 3, 5, 7]  # the first early
    assert moves[3]["pays"] and moves[3]["num_moved"] > 0
    assert moves[3]["predicted_num_bytes_per_step"] < moves[3]["present_num_bytes_per_step"]
    for r in records:
        assert (r["bytes"]["experts"] > 0) == (r["step"] in moves)
        if r["step"] in moves and moves[r["step"]]["pays"]:
            assert r["bytes"]["experts"] > moves[r["step"]]["move_num_bytes"]  # the recording is counted too
    assert any(r["seats"]["moved_share"] > 0 for r in records if r["step"] > 3)
    home = _run(settings | {"out": str(tmp_path / "home"), "rehome_every": 0, "seats": "as-read"}, 4)
    assert whole == pytest.approx(home, rel=1e-10)
    for name in ("run", "home"):
        with safe_open(str(tmp_path / name / "model.safetensors"), "pt") as f:
            exported = f.get_tensor("blocks.1.moe.experts.w_in")
        if name == "run":
            first = exported
    torch.testing.assert_close(first, exported, rtol=1e-8, atol=1e-10)

    for step in (2, 3):
        out = _copy_with_checkpoint(settings["out"], tmp_path / f"from-{step}", step)
        again = _run(settings | {"out": out, "resume": True}, 4)
        assert again == whole
    for world in (1, 2):
        out = _copy_with_checkpoint(settings["out"], tmp_path / f"at-{world}", 3)
        assert _run(settings | {"out": out, "resume": True}, world) == pytest.approx(whole, rel=1e-10)
    trace = RoutingTrace.load(tmp_path / "run" / "trace" / "step-00000006.npz")
    assert trace.num_layers == 2
    assert trace.steps[0].lengths.sum() == records[5]["tokens"]
    assert (trace.owners != spread_evenly(2, 8, 4)).any()
