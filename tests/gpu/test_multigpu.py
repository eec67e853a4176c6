"""Ranks with a GPU each, over NCCL: `make test-multigpu`. What holds over gloo on the CPU holds here.

Every number of GPUs that this machine has is tried, of 2, 4 and 8. The parent process never touches CUDA, so that ranks
can be forked.
"""

import glob
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from luffy.comm import build_mesh
from luffy.recipes import Recipe, get_recipe
from luffy.testing import run_ranks
from luffy.train.metrics import read_metrics
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer
from tests.model.cases import Case, assert_exact, shrunk
from tests.model.condensing import assert_condensed_exact

GPUS = len(glob.glob("/dev/nvidia[0-9]*"))
WORLDS = [n for n in (2, 4, 8) if n <= GPUS]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.multigpu,
    pytest.mark.skipif(not WORLDS, reason=f"{GPUS} GPUs here; these tests need two"),
]
RANDOM = replace(get_recipe("luffy"), placement="random")
RECIPES = {
    "vanilla": get_recipe("vanilla"),
    "vanilla_dedup": get_recipe("vanilla_dedup"),
    "luffy": get_recipe("luffy"),
    "luffy, random moves": RANDOM,
    "janus": get_recipe("janus"),
    "fastermoe": get_recipe("fastermoe"),
    "random moves and shadows": replace(RANDOM, residency="shadow"),
}


@pytest.mark.parametrize("world", WORLDS or [2])
@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("overlap", [False, True], ids=["", "overlap"])
def test_five_steps_equal_the_oracle(world, name, overlap):
    config = shrunk("moe-llm-tiny", num_layers=3, num_shared_experts=1)
    rehome = (1,) if "random" in name else ()
    assert_exact(
        Case(config, world=world, recipe=RECIPES[name], batch=8, micro_batches=2, steps=5, overlap=overlap,
             rehome_after=rehome, expert_flops=1e8, device="cuda")
    )  # fmt: skip


@pytest.mark.parametrize("world", [n for n in WORLDS if n > 2] or [4])
def test_expert_groups_side_by_side(world):
    if world > GPUS:
        pytest.skip(f"{GPUS} GPUs here; two groups of two need four")
    config = shrunk("moe-gpt2-tiny")
    assert_exact(Case(config, world=world, ep_size=2, batch=8, micro_batches=2, steps=5, device="cuda"))


@pytest.mark.parametrize("world", WORLDS or [2])
@pytest.mark.parametrize("condense", ["static:0.5", "static:0.5,correct", "budget:0.5"])
@pytest.mark.parametrize("moves", [False, True], ids=["stay", "moves"])
def test_condensed_steps_equal_the_oracle_that_is_told_the_leaders(world, condense, moves):
    if moves and "correct" in condense:
        pytest.skip("the correction needs sequences to stay")
    recipe = replace(RANDOM, condense=condense) if moves else Recipe("stay", "", condense=f"{condense},local")
    kept = assert_condensed_exact(Case(shrunk("moe-gpt2-tiny"), world=world, recipe=recipe, batch=8, device="cuda"))
    assert kept < 0.95


def _train(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cuda", rank), options.ep_size))
    trainer.run()


@pytest.mark.parametrize("recipe", ["vanilla_dedup", "luffy"])
def test_resume_continues_at_the_same_and_at_another_number_of_gpus(recipe, corpus, tmp_path):
    def run(world, out, steps, resume=False):
        options = TrainOptions(
            **corpus, out=str(tmp_path / out), recipe=recipe, device="cuda", dtype="float64", vocab_size=300, layers=2,
            hidden_size=32, heads=2, experts=8, expert_hidden_size=32, sequence_length=32, batch_size=8, steps=steps,
            warmup_steps=1, min_lr=1.0, eval_every=0, eval_batches=1, checkpoint_every=3, tensorboard=False,
            profile_attention=False, resume=resume, rehome_every=2,
        )  # fmt: skip
        run_ranks(_train, world, options, backend="nccl")
        return [r["loss"] for r in read_metrics(tmp_path / out / "metrics.jsonl")]

    whole = run(2, "whole", 6)
    assert run(2, "same", 3) == pytest.approx(whole[:3], rel=1e-9)
    assert run(2, "same", 6, resume=True) == pytest.approx(whole, rel=1e-9)
    for world in WORLDS[1:]:
        run(2, f"at-{world}", 3)
        assert run(world, f"at-{world}", 6, resume=True) == pytest.approx(whole, rel=1e-9)


def test_the_command_uses_nccl_with_a_gpu_each(corpus, tmp_path):
    world, out = WORLDS[-1], tmp_path / "run"
    command = [
        sys.executable, "-m", "luffy.train.cli", "train", "--recipe", "luffy", "--overlap", "--ranks", str(world),
        "--device", "cuda", "--backend", "nccl", "--steps", "4", "--batch-size", str(4 * world),
        "--data", corpus["data"], "--cache-dir", corpus["cache_dir"], "--vocab-size", "300",
        "--sequence-length", "64", "--eval-batches", "1", "--out", str(out),
    ]  # fmt: skip
    subprocess.run(command, check=True, timeout=300)
    summary = json.loads(Path(out, "summary.json").read_text())
    assert summary["world_size"] == world and summary["bytes"]["dispatch"] > 0
    assert summary["environment"]["device"] == "cuda"
