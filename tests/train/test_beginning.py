"""Ranks that begin with unlike things are named; a resumed run says what it does otherwise, and refuses the rest."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

import luffy
from luffy.comm import Comm, build_mesh
from luffy.comm.alike import RanksDifferError, check_alike, fingerprints
from luffy.errors import RankMismatchError, UserError
from luffy.hf import parallelize
from luffy.testing import run_ranks
from luffy.train.launch import join_world
from luffy.train.options import TrainOptions
from luffy.train.trainer import Trainer
from tests.hf.tiny import tiny_config, tiny_model


def _said(make):
    with pytest.raises(RanksDifferError) as caught:
        make()
    assert isinstance(caught.value, UserError) and isinstance(caught.value, RankMismatchError)
    return str(caught.value)


# What one rank of four has otherwise, and what must be said of it.
UNLIKE = {
    "seed": (7, "--seed is 0 on rank 0 and 7 on rank 2"),
    "lr": (0.5, "--lr is 0.001 on rank 0 and 0.5 on rank 2"),
    "steps": (9, "--steps is 6 on rank 0 and 9 on rank 2"),
    "batch_size": (16, "--batch-size is 8 on rank 0 and 16 on rank 2"),
    "recipe": ("vanilla", "--recipe is vanilla_dedup on rank 0 and vanilla on rank 2"),
    "clip_norm": (0.0, "--clip-norm"),
    "wire": ("int8", "--wire is None on rank 0 and int8 on rank 2"),
    "bias_update_rate": (0.1, "--bias-update-rate"),
    "eval_every": (3, "--eval-every"),
}


def _options(rank, settings, other_data):
    mesh, lines = build_mesh(torch.device("cpu")), {}
    for name, (value, _) in UNLIKE.items():
        mine = TrainOptions(**settings | ({name: value} if rank == 2 else {}))
        lines[name] = _said(lambda mine=mine: Trainer(mine, mesh))
    mine = TrainOptions(**settings | ({"data": other_data} if rank == 1 else {}))
    lines["data"] = _said(lambda: Trainer(mine, mesh))
    # The same files elsewhere are the same data.
    copy = Path(other_data).parent / "copy" / Path(settings["data"]).name
    Trainer(
        TrainOptions(**settings | ({"data": str(copy), "out": str(copy.parent / "out")} if rank == 3 else {})), mesh
    )
    return lines


def test_options_and_data_of_one_rank(small, tmp_path):
    settings = small()
    lines = Path(settings["data"]).read_text().splitlines()
    (tmp_path / "copy").mkdir()
    shutil.copy(settings["data"], tmp_path / "copy")
    (tmp_path / "other.jsonl").write_text("\n".join([*lines[1:], lines[0][:-20] + '"}']))
    found = run_ranks(_options, 4, settings, str(tmp_path / "other.jsonl"))
    assert all(other == found[0] for other in found[1:])
    for name, (_, words) in UNLIKE.items():
        assert words in found[0][name] and "start all ranks with the same" in found[0][name]
    assert f"--data is {settings['data']} (" in found[0]["data"] and "other.jsonl (" in found[0]["data"]
    assert "on rank 0" in found[0]["data"] and "on rank 1" in found[0]["data"]


def _code(rank):
    if rank == 1:
        from luffy.comm import alike

        alike.code_facts.cache_clear()
        alike.__version__ = "0.0.1"
    return _said(lambda: join_world("cpu", "gloo"))


def _world(rank):
    if rank == 1:
        return _said(lambda: join_world("cpu", "gloo", 1))
    return _said(lambda: join_world("cpu", "gloo", 2))


def test_code_and_mesh():
    for line in run_ranks(_code, 2):
        assert "luffy is" in line and "0.0.1" in line and "on rank 1" in line
    for line in run_ranks(_world, 2):
        assert "--ep-size is 2 on rank 0 and 1 on rank 1" in line


def _weights(rank):
    mesh = build_mesh(torch.device("cpu"), 2)
    comm, lines = Comm.create(mesh), {}

    class Own(nn.Module):
        def __init__(self, seed, **settings):
            super().__init__()
            torch.manual_seed(seed)
            self.map = nn.Linear(8, 8)
            self.moe = luffy.MoEBlock(8, 8, 4, mesh=mesh, **settings)

    luffy.GradientSync(Own(0), comm)
    lines["seed"] = _said(lambda: luffy.GradientSync(Own(int(rank == 3)), comm))
    swapped = Own(0)
    if rank == 1:
        with torch.no_grad():  # the same numbers in another order: sums would not tell
            swapped.map.weight.copy_(swapped.map.weight.flip(0))
    lines["order"] = _said(lambda: luffy.GradientSync(swapped, comm))
    copies = Own(0)
    if rank == 2:
        with torch.no_grad():  # ranks 0 and 2 hold copies of the same experts
            next(copies.moe.moe.experts.parameters())[0, 0, 0] += 1e-3
    lines["copies"] = _said(lambda: luffy.GradientSync(copies, comm))
    lines["config"] = _said(lambda: luffy.GradientSync(Own(0, balance_loss=0.1 * (rank == 1)), comm))
    lines["form"] = _said(lambda: luffy.GradientSync(Own(0), comm, "int8" if rank == 1 else "model"))
    model = tiny_model(tiny_config("mixtral"), torch.float32, seed=int(rank == 1))
    lines["library"] = _said(lambda: parallelize(model, mesh))
    config = tiny_config("mixtral", rms_norm_eps=1e-3 if rank == 1 else 1e-5)
    lines["configuration"] = _said(lambda: parallelize(tiny_model(config, torch.float32), mesh))
    lines["losses"] = _said(
        lambda: parallelize(tiny_model(tiny_config("mixtral"), torch.float32), mesh, z_loss=0.1 * rank)
    )
    return lines


def test_weights_and_settings_of_models():
    found = run_ranks(_weights, 4)
    assert all(other == found[0] for other in found[1:])
    lines = found[0]
    assert "different weights" in lines["seed"] and "map." in lines["seed"] and "on rank 3" in lines["seed"]
    assert "map.weight" in lines["order"] and "on rank 1" in lines["order"]
    assert "different experts" in lines["copies"] and "rank 0" in lines["copies"] and "rank 2" in lines["copies"]
    assert "balance_loss=0.1" in lines["config"] and "int8 on rank 1" in lines["form"]
    assert "different weights" in lines["library"] and "on rank 1" in lines["library"]
    assert "configuration" in lines["configuration"] and "z_loss is 0.0 on rank 0 and 0.1 on rank 1" in lines["losses"]


def test_fingerprints_see_every_bit():
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.int8, torch.bool):
        a = (torch.arange(5000) % 2).to(dtype)
        b = a.clone()
        b[4321] = 1 - int(b[4321])
        assert len(set(fingerprints([a, b, a.flip(0)]))) == 3
        assert fingerprints([a.clone(), a]) == [fingerprints([a])[0]] * 2
    assert fingerprints([torch.tensor(0.0)]) != fingerprints([torch.tensor(-0.0)])
    check_alike({"anything": 1}, torch.device("cpu"))  # without a world there is nobody to differ from


def _train(rank, options):
    trainer = Trainer(options, build_mesh(torch.device("cpu"), options.ep_size))
    trainer.run()
    return trainer.changes


def _refusals(rank, cases):
    lines = []
    for options in cases:
        with pytest.raises(UserError) as caught:
            Trainer(options, build_mesh(torch.device("cpu"))).run()
        lines.append(str(caught.value))
    return lines


def test_resume_with_other_options(small, tmp_path, capfd):
    base = small(steps=3, dtype="float32")
    first = TrainOptions(**base)
    run_ranks(_train, 1, first)
    source = Path(base["data"]).read_text().splitlines()
    other = tmp_path / "other.jsonl"
    other.write_text("\n".join([*source, json.dumps({"text": "more " * 300})]))
    tokenizer = str(next(Path(base["cache_dir"]).rglob("tokenizer.json")))

    said = {
        "lr": (0.5, "--lr was 0.001, is 0.5"), "weight_decay": (0.0, "--weight-decay was 0.1, is 0"),
        "warmup_steps": (2, "--warmup-steps was None, is 2"), "wire": ("int8", "--wire was None, is int8"),
        "clip_norm": (0.0, "--clip-norm was 1, is 0"), "min_lr": (0.2, "--min-lr was 0.1, is 0.2"),
        "dtype": ("bfloat16", "--dtype was float32, is bfloat16"), "steps": (4, "--steps was 3, is 4"),
        "recipe": ("luffy", "--recipe was vanilla_dedup, is luffy"), "eval_batches": (2, "--eval-batches was 1, is 2"),
        "gradient_dtype": ("bfloat16", "--gradient-dtype was None, is bfloat16"),
    }  # fmt: skip
    again = replace(first, resume=True, **{name: value for name, (value, _) in said.items()})
    capfd.readouterr()
    assert run_ranks(_train, 1, again)[0] == sorted((w for _, w in said.values()), key=_order(again))
    shown = capfd.readouterr().err
    assert all(words in shown for _, words in said.values())
    # What makes no difference is no news.
    quiet = replace(again, checkpoint_every=1, tensorboard=True, keep_checkpoints=4, export=True, recompute=True)
    assert run_ranks(_train, 1, quiet)[0] == []

    cases = {
        "seed": replace(again, seed=1), "batch-size": replace(again, batch_size=4),
        "accumulate": replace(again, accumulate=2), "overlap": replace(again, overlap=True),
        "sequence-length": replace(again, sequence_length=16), "--steps 2": replace(again, steps=2),
        "balance_loss was 0.01, is 0.5": replace(again, balance_loss=0.5),
        "num_layers was 2, is 3": replace(again, layers=3),
        "tokenizer": replace(again, data=str(other)),
    }  # fmt: skip
    for words, line in zip(cases, run_ranks(_refusals, 1, list(cases.values()))[0], strict=True):
        assert line.startswith("--resume") and words in line, line

    # Other text in the same tokens may follow, and is said.
    shutil.copytree(first.out, tmp_path / "told", ignore=shutil.ignore_patterns("checkpoints"))
    told = replace(first, out=str(tmp_path / "told"), tokenizer=tokenizer, overwrite=True)
    run_ranks(_train, 1, told)
    lines = run_ranks(_train, 1, replace(told, overwrite=False, resume=True, steps=4, data=str(other)))[0]
    assert len(lines) == 2 and lines[0] == "--steps was 3, is 4"
    assert f"--data was {first.data}, is {other}, with other text" in lines[1]


def _order(options):
    names = ["--" + name.replace("_", "-") for name in options.to_dict()]
    return lambda line: names.index(line.split()[0])
