"""Coded rows over a run: random rounding repeats itself after a resume, a value that is not finite stops the run."""

import shutil

import pytest
import torch

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.testing import run_ranks
from luffy.testing.processes import losses
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer


def _train(rank, options):
    Trainer(options, build_mesh(torch.device("cpu"))).run()


def test_a_resumed_run_draws_the_same_numbers(small, tmp_path):
    settings = small(recipe="luffy", wire="int4-sr", accumulate=2, rehome_every=2, steps=4,
                     checkpoint_every=2, keep_checkpoints=5)  # fmt: skip
    run_ranks(_train, 2, TrainOptions(**settings))
    whole = losses(settings["out"])
    again = tmp_path / "again"
    shutil.copytree(settings["out"], again)
    shutil.rmtree(again / "checkpoints" / "step-00000004")
    run_ranks(_train, 2, TrainOptions(**(settings | {"out": str(again), "resume": True})))
    assert losses(again) == whole
    assert len(set(whole)) == 4


def _overflow(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu")))
    with torch.no_grad():
        if rank == 1:  # one expert's answers leave float32's range: rows of all ranks' tokens come back infinite
            for p in trainer.model.moe_layers[0].experts.parameters():
                p.mul_(1e30)
    with pytest.raises(UserError, match="step 1: loss"):
        trainer.train_step()
    return True


def test_an_infinite_row_stops_every_rank_and_names_the_step(small):
    for wire in ("int4", "int8"):
        options = TrainOptions(**small(dtype="float32", wire=wire, clip_norm=0.0))
        assert run_ranks(_overflow, 2, options) == [True, True]
