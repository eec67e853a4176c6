"""Checkpoints: nothing in them runs code, a damaged one is passed over, a bad step is in none."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.testing import run_ranks
from luffy.testing.processes import losses
from luffy.train.checkpoint_files import META, TENSORS, dump_meta, fingerprint, list_checkpoints, read_meta
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer


def _train(rank, options):
    try:
        Trainer(options, build_mesh(torch.device("cpu"))).run()
    except UserError as error:
        return str(error)
    return None


def _flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x01
    path.write_bytes(content)


def _data_of(folder, rank):
    return next(folder.glob(f"__{rank}_*.distcp"))


def _change_meta(folder):
    """As somebody would who changes a setting: a step of its own, in well-formed JSON."""
    path = folder / META
    path.write_text(path.read_text().replace('"step": 6', '"step": 5'))


DAMAGES = {
    "a flipped bit": lambda folder: _flip(_data_of(folder, 1)),
    "a missing file": lambda folder: _data_of(folder, 0).unlink(),
    "a cut file": lambda folder: os.truncate(_data_of(folder, 0), 100),
    "another description": lambda folder: (folder / TENSORS).write_text("{}"),
    "a changed meta": _change_meta,
    "a meta of another shape": lambda folder: (folder / META).write_text('["step", 6]'),
}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_put_aside_and_the_one_before_continues_to_the_same_bits(small, tmp_path):
    settings = small(keep_checkpoints=5, steps=7)
    run_ranks(_train, 2, TrainOptions(**settings))
    whole = losses(settings["out"])
    shutil.rmtree(Path(settings["out"], "checkpoints", "step-00000007"))
    for name, damage in DAMAGES.items():
        out = tmp_path / name
        shutil.copytree(settings["out"], out)
        damage(out / "checkpoints" / "step-00000006")
        assert run_ranks(_train, 2, TrainOptions(**settings | {"out": str(out), "resume": True})) == [None, None]
        assert losses(out) == whole, name
        kept = sorted(p.name for p in (out / "checkpoints").iterdir())
        assert kept == ["damaged-step-00000006", "step-00000003", "step-00000006", "step-00000007"], name
    # Where none is whole, nothing is begun anew, and nothing is lost.
    for checkpoint in list_checkpoints(out / "checkpoints"):
        _flip(_data_of(checkpoint, 0))
    answers = run_ranks(_train, 2, TrainOptions(**settings | {"out": str(out), "resume": True}))
    assert all("every checkpoint in" in a and "step-00000003 (__0_0.distcp is not" in a for a in answers)
    assert all("\n" not in a for a in answers)
    assert losses(out) == whole and len(list((out / "checkpoints").iterdir())) == 3


class _Bomb:
    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return (open, (self.path, "w"))


def test_reading_a_checkpoint_runs_nothing_that_is_in_it(small, tmp_path):
    settings = small(keep_checkpoints=1, steps=2)
    run_ranks(_train, 1, TrainOptions(**settings))
    checkpoint = Path(settings["out"], "checkpoints", "step-00000002")
    assert not [p.name for p in checkpoint.iterdir() if p.suffix not in (".json", ".distcp")]
    resume = TrainOptions(**settings | {"resume": True, "steps": 3})

    def rewrite(**files):
        """Checksums are no defence against somebody who can write them."""
        meta = read_meta(checkpoint)
        for name, content in files.items():
            (checkpoint / name).write_bytes(content)
            meta["files"][name] = fingerprint(checkpoint / name)
        (checkpoint / META).write_text(dump_meta(meta))

    description = json.loads((checkpoint / TENSORS).read_text())
    (checkpoint / ".metadata").write_bytes(pickle.dumps(_Bomb(tmp_path / "metadata")))
    name = _data_of(checkpoint, 0).name
    torch.save(_Bomb(tmp_path / "data"), tmp_path / "bomb.pt")
    bomb = (tmp_path / "bomb.pt").read_bytes()
    before = _data_of(checkpoint, 0).read_bytes()
    places = [[*place[:4], 0, len(bomb)] for place in description["places"]]
    rewrite(**{name: bomb, TENSORS: json.dumps(description | {"places": places}).encode()})
    (answer,) = run_ranks(_train, 1, resume)
    assert "does not fit" in answer or "damaged" in answer

    outside = [[*place[:3], "../../elsewhere", *place[4:]] for place in description["places"]]
    rewrite(**{name: before, TENSORS: json.dumps(description | {"places": outside}).encode()})
    (answer,) = run_ranks(_train, 1, resume)
    assert "tensors.json" in answer
    assert not (tmp_path / "metadata").exists() and not (tmp_path / "data").exists()


def test_a_step_that_is_not_finite_is_in_no_checkpoint(small):
    settings = small(dtype="float32", checkpoint_every=1, steps=4, lr=1e30, warmup_steps=1, keep_checkpoints=9)
    answers = run_ranks(_train, 2, TrainOptions(**settings))
    assert all(a is not None and a.startswith("step ") and "not finite" in a for a in answers), answers
    # Such weights are finite after the first step; no loss that they give is.
    saved = list_checkpoints(Path(settings["out"], "checkpoints"))
    assert not saved, saved
    assert all(a.startswith("step 1: ") for a in answers), answers


def _with_bad_steps(rank, options, bad):
    """A run in which the gradients of some steps are infinite on one rank; the weights before and after each step."""
    trainer = Trainer(options, build_mesh(torch.device("cpu")))
    if rank == 1:
        weight = trainer.model.moe_layers[0].router.weight
        weight.register_hook(lambda g: g * float("inf") if trainer.step + 1 in bad else g)
    try:
        trainer.run()
    except UserError as error:
        return str(error)
    return trainer.ops.guard.skipped


def test_bad_steps_are_left_out_up_to_a_limit(small, tmp_path):
    settings = small(skip_bad_steps=2, checkpoint_every=0, steps=5)
    assert run_ranks(_with_bad_steps, 2, TrainOptions(**settings), (2, 4)) == [2, 2]
    records = read_metrics(Path(settings["out"], "metrics.jsonl"))
    assert [r.get("skipped") for r in records] == [None, 1, None, 2, None]
    assert all(r["grad_norm"] is None for r in records if "skipped" in r)
    assert read_meta(list_checkpoints(Path(settings["out"], "checkpoints"))[-1])["skipped_steps"] == 2
    other = TrainOptions(**settings | {"out": str(tmp_path / "other"), "skip_bad_steps": 1})
    answers = run_ranks(_with_bad_steps, 2, other, (2, 4))
    assert all("step 4: " in a and "1 steps had been left out" in a and "backward pass" in a for a in answers), answers


def _bad_output(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu")))
    names = [n for n, m in trainer.model.named_modules() if isinstance(m, torch.nn.Linear)]
    module = trainer.model.get_submodule(names[0])
    if rank == 1:
        module.register_forward_hook(lambda _, __, out: out * float("nan"))
    with pytest.raises(UserError) as caught:
        trainer.train_step()
    return names[0] in str(caught.value) or str(caught.value)


def test_the_message_names_the_first_module_that_is_not_finite(small):
    assert run_ranks(_bad_output, 2, TrainOptions(**small())) == [True, True]
