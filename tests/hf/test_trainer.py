"""The examples for transformers' Trainer and TRL on two ranks train as the unchanged scripts do in one process."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM

from examples import hf_trainer
from luffy.testing import run_ranks

from .tiny import collate, plain_loss, random_rows, tiny_config, tiny_model, tiny_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("trainer")
    tiny_model(tiny_config("mixtral", vocab_size=256), torch.float32).save_pretrained(root / "mixtral")
    config = tiny_config("qwen3_moe", vocab_size=97, router_aux_loss_coef=0.05)  # which TRL switches on
    tiny_model(config, torch.float32).save_pretrained(root / "qwen")
    tiny_tokenizer().save_pretrained(root / "qwen")
    lines = []
    for i in range(64):
        said = [("user", f"what is {i}+1?" + "?" * (i % 7)), ("assistant", str(i + 1) * (1 + i % 3))]
        lines.append(json.dumps({"messages": [{"role": role, "content": text} for role, text in said]}))
    (root / "chats.jsonl").write_text("\n".join(lines))
    return root


def run_script(module: ModuleType, out: Path, **options: Any) -> list[dict[str, Any]]:
    """The script's `main` in this process, as the command line would call it; what was logged."""
    from accelerate.state import AcceleratorState

    AcceleratorState._reset_state(True)  # of an earlier script in this process
    arguments = [module.__name__, "--out", str(out)]
    for name, value in options.items():
        name = "--" + name.replace("_", "-")
        arguments += [name] if value is True else [name, str(value)]
    with patch.object(sys, "argv", arguments):
        module.main()
    return log_of(out) if os.environ.get("RANK", "0") == "0" else []


def log_of(out: Path) -> list[dict[str, Any]]:
    log: list[dict[str, Any]] = json.loads((out / "log.json").read_text())
    return log


def assert_same(found: list[dict[str, Any]], wanted: list[dict[str, Any]], rel: float = 1e-5) -> None:
    for key in ("loss", "grad_norm", "eval_loss"):
        values, expected = ([r[key] for r in log if key in r] for log in (found, wanted))
        assert values == pytest.approx(expected, rel=rel if key != "grad_norm" else 10 * rel), key
        assert key == "eval_loss" or len(values) >= 3


def near(one: Path, other: Path) -> None:
    """Two folders of weights are alike, but for few: Adam's first steps turn gradients near zero, whose signs are
    rounding, into whole steps."""
    a, b = (AutoModelForCausalLM.from_pretrained(folder).state_dict() for folder in (one, other))
    assert a.keys() == b.keys()
    for name in a:
        off = (a[name] - b[name]).abs()
        assert float(off.max()) < 5e-3 and float((off > 1e-5).float().mean()) < 0.02, name


@pytest.mark.slow
def test_the_example_under_torchrun(folder: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "hf_trainer.py"), "--model", str(folder / "mixtral"), "--out", str(tmp_path)]
    command += ["--steps", "3", "--save-steps", "3", "--dense", "sharded", "--accumulate", "2"]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    for line in done.stderr.splitlines():
        assert "Warning" not in line, "a normal run is quiet"
    options: dict[str, Any] = {"steps": 3, "save_steps": 3, "rows": 8, "accumulate": 2, "plain": True}
    wanted = run_script(hf_trainer, tmp_path / "plain", model=folder / "mixtral", **options)
    assert_same(log_of(tmp_path), wanted)
    near(tmp_path / "model", tmp_path / "plain" / "model")


def run_two_ranks(rank: int, folder: Path, out: Path) -> tuple[float, float]:
    settings: dict[str, Any] = {"model": folder / "mixtral", "steps": 4, "save_steps": 2, "rows": 4}
    run_script(hf_trainer, out / "whole", **settings, best=True)
    # Stopped after step 2, and resumed.
    run_script(hf_trainer, out / "halves", **settings)
    torch.distributed.barrier()
    if rank == 0:
        shutil.rmtree(out / "halves" / "checkpoint-4")
    torch.distributed.barrier()
    run_script(hf_trainer, out / "halves", **settings, resume=True)
    run_script(hf_trainer, out / "bf16", **settings, bf16=True)
    if rank == 0:
        assert not (out / "halves" / "checkpoint-4" / ".saving").exists()
        assert {"config.json", "trainer_state.json", "training_args.bin", "rng_state_1.pth", "luffy"} <= {
            p.name for p in (out / "halves" / "checkpoint-4").iterdir()
        }
    return view_of_a_model(rank, folder)


def view_of_a_model(rank: int, folder: Path) -> tuple[float, float]:
    """Loss and logits of rows padded on the left, as any program would ask for them."""
    import luffy.hf

    model = luffy.hf.CausalLM(luffy.hf.load(folder / "mixtral")).eval()
    rows = random_rows(4, 5, 12, vocab_size=256)
    mine = rows[:3] if rank == 0 else rows[3:]
    inputs = collate(mine, "left")
    out = model(**inputs, return_logits=True)
    plain = AutoModelForCausalLM.from_pretrained(folder / "mixtral").eval()
    with torch.no_grad():
        position_ids = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
        wanted = plain(inputs["input_ids"], attention_mask=inputs["attention_mask"], position_ids=position_ids).logits
        loss = plain_loss(plain, rows, "right")
    seen = inputs["attention_mask"].bool()
    assert torch.allclose(out.logits[seen], wanted[seen], atol=1e-4)
    total = model.parallel.runtime.comm.all_reduce(out.loss.clone())
    return float(total), float(loss)


def test_checkpoints_resume_to_the_bit_and_the_best_model_returns(folder: Path, tmp_path: Path) -> None:
    for found, loss in run_ranks(run_two_ranks, 2, folder, tmp_path):
        assert found == pytest.approx(loss, rel=1e-5)
    settings: dict[str, Any] = {"model": folder / "mixtral", "steps": 4, "save_steps": 2, "rows": 8}
    wanted = run_script(hf_trainer, tmp_path / "plain", **settings, plain=True, best=True)
    whole, halves, bf16 = (log_of(tmp_path / n) for n in ("whole", "halves", "bf16"))
    assert_same(whole, wanted)
    assert_same(bf16, wanted, rel=0.03)
    near(tmp_path / "whole" / "model", tmp_path / "plain" / "model")
    for key in ("loss", "grad_norm", "eval_loss", "learning_rate"):
        assert [r[key] for r in halves if key in r][:4] == [r[key] for r in whole if key in r][:4], key
    one, other = (
        AutoModelForCausalLM.from_pretrained(tmp_path / n / "model").state_dict() for n in ("whole", "halves")
    )
    assert all(torch.equal(one[name], other[name]) for name in one)


def run_sft(rank: int, folder: Path, out: Path) -> None:
    from examples import trl_sft

    settings: dict[str, Any] = {"model": folder / "qwen", "data": folder / "chats.jsonl", "steps": 3, "rows": 4}
    run_script(trl_sft, out / "padded", **settings)
    run_script(trl_sft, out / "packed", **settings, packing=True)
    run_script(trl_sft, out / "lora", **settings, lora=4)


def test_supervised_fine_tuning_with_trl(folder: Path, tmp_path: Path) -> None:
    pytest.importorskip("trl")
    from peft import PeftModel

    from examples import trl_sft

    run_ranks(run_sft, 2, folder, tmp_path)
    settings: dict[str, Any] = {"model": folder / "qwen", "data": folder / "chats.jsonl", "steps": 3, "plain": True}
    wanted = run_script(trl_sft, tmp_path / "plain", **settings, rows=8)
    padded, packed, lora = (log_of(tmp_path / n) for n in ("padded", "packed", "lora"))
    assert_same(padded, wanted)
    near(tmp_path / "padded" / "model", tmp_path / "plain" / "model")
    losses = [r["loss"] for r in packed if "loss" in r]
    assert len(losses) == 3 and losses[-1] < losses[0]
    losses = [r["loss"] for r in lora if "loss" in r]
    assert losses[0] == pytest.approx(padded[0]["loss"], rel=1e-5), "an adapter begins as nothing"
    base = AutoModelForCausalLM.from_pretrained(folder / "qwen")
    adapted = PeftModel.from_pretrained(base, str(tmp_path / "lora" / "model"))
    assert any("experts" in n and "lora_B" in n and bool(p.any()) for n, p in adapted.named_parameters())


def ask_for_what_cannot_be(rank: int, folder: Path, out: Path) -> None:
    from transformers import Trainer, TrainingArguments

    import luffy.hf
    from luffy.errors import UserError

    model = luffy.hf.load(folder / "mixtral")
    trainer = luffy.hf.trainer_of(Trainer)
    with pytest.raises(UserError, match="label_smoothing_factor"):
        trainer(model, TrainingArguments(str(out), use_cpu=True, report_to="none", label_smoothing_factor=0.1))
    with pytest.raises(UserError, match=r"luffy\.hf\.load"):
        trainer(torch.nn.Linear(1, 1), TrainingArguments(str(out), use_cpu=True, report_to="none"))
    with pytest.raises(UserError, match="pixel_values"):
        luffy.hf.CausalLM(model)(torch.zeros(1, 2, dtype=torch.int64), pixel_values=torch.zeros(1))


def test_a_loss_of_its_own_is_refused() -> None:
    """It would not be called: preferences (DPO) would silently be trained on as plain text."""
    from transformers import Trainer

    import luffy.hf
    from luffy.errors import UserError

    class Weighted(Trainer):
        def compute_loss(self, *arguments: Any, **options: Any) -> Any:
            raise AssertionError

    trl = pytest.importorskip("trl")
    for cls in (Weighted, trl.DPOTrainer):
        with pytest.raises(UserError, match=rf"trainer_of\({cls.__name__}\): {cls.__name__}.compute_loss needs"):
            luffy.hf.trainer_of(cls)
    luffy.hf.trainer_of(type("Mine", (trl.SFTTrainer,), {}))


def test_what_cannot_be_is_one_line(folder: Path, tmp_path: Path) -> None:
    run_ranks(ask_for_what_cannot_be, 1, folder, tmp_path)
