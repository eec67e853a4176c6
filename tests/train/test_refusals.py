"""Numbers that cannot be, sizes that cannot fit, outputs that are inputs: refused in one line that says what can be."""

import dataclasses
import json
import os
import time

import pytest
import torch

from luffy.comm import build_mesh
from luffy.condensation import parse_condense
from luffy.config import ModelConfig, RouterConfig
from luffy.errors import UserError
from luffy.hf.options import FinetuneOptions
from luffy.hf.upcycle import upcycle
from luffy.ranges import Range
from luffy.testing import run_ranks
from luffy.train.cli import main
from luffy.train.compare import Comparison
from luffy.train.memory import count_parameters
from luffy.train.options import TrainOptions
from luffy.train.plan import run_plan
from luffy.train.trainer import Trainer

NAN, INF = float("nan"), float("inf")
# Every numeric option of a run, with what it must not be; NaN and infinities come on top.
BELOW_ONE, BELOW_ZERO = (0, -1), (-1,)
TRAIN = {
    **dict.fromkeys(
        ("ranks", "steps", "batch_size", "accumulate", "eval_batches", "auto_every", "ep_size", "ranks_per_node",
         "vocab_size", "sequence_length", "layers", "hidden_size", "heads", "experts", "top_k", "expert_hidden_size",
         "dense_hidden_size", "moe_every", "max_sequence_length", "topics", "min_ranks"), BELOW_ONE,
    ),
    **dict.fromkeys(
        ("eval_every", "checkpoint_every", "keep_checkpoints", "rehome_every", "trace_every", "condense_warmup",
         "warmup_steps", "seed", "lr", "weight_decay", "clip_norm", "balance_loss", "z_loss", "locality_loss",
         "bias_update_rate", "shared_experts", "memory_length", "latent_size", "seat_loss", "seat_loss_warmup",
         "num_groups", "top_k_groups", "max_restarts", "skip_bad_steps"), (*BELOW_ZERO, -3),
    ),
    "min_lr": (-5, 1.5), "condense_until": (-0.1, 1.1), "valid_fraction": (0, 1, -1, 2), "capacity_factor": (0, -1),
    "timeout_seconds": (0, -1),
}  # fmt: skip


def test_every_numeric_option_is_in_the_table():
    numeric = {f.name for f in dataclasses.fields(TrainOptions) if "int" in str(f.type) or "float" in str(f.type)}
    assert numeric <= set(TRAIN)


@pytest.mark.parametrize("name", TRAIN)
def test_numbers_that_cannot_be(name):
    option = "--" + name.replace("_", "-")
    for value in (*TRAIN[name], NAN, INF, -INF):
        with pytest.raises(UserError) as caught:
            TrainOptions(**{name: value})
        words = str(caught.value)
        assert words.startswith(f"{option} {value:g}: give a") and "number" in words, words
        assert "negative" not in words


@pytest.mark.parametrize("text", ["static:2", "static:-1.5", "static:nan", "static:inf", "lsh:0", "lsh:1.5",
                                  "lsh:nan", "lsh:inf", "lsh-causal:17"])  # fmt: skip
def test_condensation_that_cannot_be(text):
    with pytest.raises(UserError, match=r"--condense .* number from -?\d+ to \d+"):
        parse_condense(text)


def test_numbers_of_models_and_of_other_commands(tmp_path):
    for name in ("balance_loss", "z_loss", "locality_loss", "bias_update_rate", "capacity_factor"):
        for value in (NAN, INF, -1.0):
            with pytest.raises(UserError, match=name.replace("_", "-")):
                RouterConfig(**{name: value})
    for name in ("rope_base", "norm_eps", "init_std"):
        for value in (NAN, INF, -1.0):
            with pytest.raises(UserError, match=name):
                ModelConfig(**{name: value})
    for change, words in (({"noise": NAN}, "--noise"), ({"noise": -1.0}, "--noise"), ({"noise": INF}, "--noise"),
                          ({"experts": 0}, "--experts"), ({"top_k": 0}, "--top-k"), ({"top_k": 9}, "--top-k"),
                          ({"seed": -1}, "--seed")):  # fmt: skip
        with pytest.raises(UserError, match=words):
            upcycle(tmp_path / "dense", tmp_path / "moe", **change)
    for change in ({"repeats": 0}, {"target_loss": NAN}, {"target_loss": -1.0}):
        with pytest.raises(UserError, match="give a"):
            Comparison("vanilla", TrainOptions(), **change).run()
    plan = {"trace": tmp_path, "spec": "2:intra=1gbit", "recipes": "vanilla", "ep_size": None, "layout": "packed",
            "compute_seconds": None, "expert_flops": 1e14, "target": None, "figure": None}  # fmt: skip
    for change in ({"compute_seconds": NAN}, {"compute_seconds": -1.0}, {"expert_flops": INF}, {"expert_flops": 0.0}):
        with pytest.raises(UserError, match="give a number"):
            run_plan(**plan | change)
    (tmp_path / "m").mkdir()
    (tmp_path / "d.jsonl").write_text("{}\n")
    for change in ({"lora_alpha": 0}, {"lora_alpha": -1}, {"lora": -1}, {"lr": NAN}, {"min_lr": NAN}):
        with pytest.raises(UserError, match="give a"):
            FinetuneOptions(model=str(tmp_path / "m"), data=str(tmp_path / "d.jsonl"), **change)
    assert str(Range(0, 1, above=True, below=True)) == "a number above 0 and below 1"


def test_a_folder_without_a_run_is_named_by_what_named_it(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 2 and capsys.readouterr().err.startswith("luffy: error: RUN: ")
    with pytest.raises(UserError, match=r"^--also: .*metrics.jsonl does not exist"):
        Comparison("vanilla,luffy", TrainOptions(out=str(tmp_path / "new")), also=(str(tmp_path),)).run()


def _meshes(rank):
    for ranks_per_node in (0, -1):
        with pytest.raises(UserError, match="--ranks-per-node"):
            build_mesh(torch.device("cpu"), None, ranks_per_node)


def test_a_node_without_ranks():
    run_ranks(_meshes, 1)


def _too_large(rank, settings):
    begin, lines = time.monotonic(), []
    for changes in (
        {"hidden_size": 1 << 20}, {"layers": 2000, "hidden_size": 8192},
        {"experts": 1 << 20, "expert_hidden_size": 4096},
        {"dense_hidden_size": 1 << 40, "moe_every": 2}, {"max_sequence_length": 1 << 40},
        {"batch_size": 1 << 44}, {"batch_size": 1 << 36, "sequence_mode": "fixed"},
    ):  # fmt: skip
        with pytest.raises(UserError) as caught:
            Trainer(TrainOptions(**settings | changes), build_mesh(torch.device("cpu")))
        lines.append(str(caught.value))
    assert time.monotonic() - begin < 20
    return lines


def test_sizes_that_cannot_fit_are_refused_at_once(small):
    for line in run_ranks(_too_large, 2, small())[0]:
        assert line.startswith("a rank needs at least") and "over 2 ranks" in line and "--hidden-size" in line


def _counted(rank, settings):
    trainer = Trainer(TrainOptions(**settings), build_mesh(torch.device("cpu")))
    return sum(p.numel() for p in trainer.model.parameters()), sum(count_parameters(trainer.config, 2))


def test_the_arithmetic_counts_the_matrices_that_are_there(small):
    for changes in ({}, {"model": "moe-llm-tiny", "shared_experts": 1, "moe_every": 2}):
        there, counted = run_ranks(_counted, 2, small(**changes))[0]
        assert 0.95 * there < counted <= there


def test_no_run_writes_over_its_input(tmp_path):
    (tmp_path / "run" / "model").mkdir(parents=True)
    (tmp_path / "run" / "tokens").mkdir()
    (tmp_path / "run" / "model.safetensors").write_bytes(b"")
    data = tmp_path / "run" / "metrics.jsonl"
    inside = tmp_path / "run" / "tokens" / "mine.jsonl"
    beside = tmp_path / "run" / "mine.jsonl"
    for path in (data, inside, beside):
        path.write_text("{}\n")
    os.symlink(tmp_path / "run", tmp_path / "link")
    run, base = str(tmp_path / "run"), str(tmp_path)
    for changes in (
        {"start_weights": f"{run}/model.safetensors"}, {"start_weights": f"{base}/link/model.safetensors"},
        {"data": str(data)}, {"data": str(inside)}, {"data": run}, {"data": base},
    ):  # fmt: skip
        with pytest.raises(UserError, match="--out"):
            TrainOptions(out=run, **changes)
    TrainOptions(out=run, data=str(beside))
    TrainOptions(out=f"{base}/other", data=run)
    for out in (run, f"{base}/link"):
        with pytest.raises(UserError, match="would replace its own input, --model"):
            FinetuneOptions(model=f"{run}/model", data=str(beside), out=out)
    for trace in (tmp_path / "run" / "t.npz", tmp_path / "link" / "t.npz"):
        (tmp_path / "run" / "t.npz").write_bytes(b"kept")
        with pytest.raises(UserError, match="would replace its own input, --trace"):
            run_plan(trace=trace, spec="2:intra=1gbit", recipes="vanilla", ep_size=None, layout="packed",
                     compute_seconds=None, expert_flops=1, target=tmp_path / "run" / "t.npz", figure=None)  # fmt: skip


def test_upcycle_keeps_its_source(tmp_path):
    source = tmp_path / "home" / "dense"
    source.mkdir(parents=True)
    (source / "config.json").write_text(json.dumps({"model_type": "llama"}))
    os.symlink(source, tmp_path / "alias")
    for out in (source, tmp_path / "home", tmp_path / "alias", tmp_path / "home" / ".." / "home" / "dense"):
        with pytest.raises(UserError, match="would replace its own input, --model"):
            upcycle(source, out, overwrite=True)
        assert (source / "config.json").exists()
