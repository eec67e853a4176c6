"""examples/hf_trainer.py on two ranks trains as the library's Trainer does in one process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from transformers import AutoModelForCausalLM, Trainer

from examples import hf_trainer
from examples.hf_trainer import pieces, settings, tiny_model
from luffy.testing import run_ranks
from luffy.train.gradients import make_optimizer

ROOT = Path(__file__).parents[2]


def plain(out: Path, parts: int) -> tuple[list[dict[str, Any]], torch.nn.Module]:
    """The same rows in the same steps: twice as many at once. What was logged, and the model."""
    model = tiny_model()
    train, held_out = pieces(Path(json.__file__).read_bytes())
    optimizers = make_optimizer(model, 1e-3, 0.01, fused=False), None
    trainer = Trainer(
        model, settings(out, 3, 8, parts), train_dataset=train, eval_dataset=held_out, optimizers=optimizers
    )
    trainer.train()
    return trainer.state.log_history, model


def arguments(out: Path, dense: str, parts: int) -> list[str]:
    return ["--out", str(out), "--steps", "3", "--dense", dense, "--accumulate", str(parts)]


def run_example(rank: int, words: list[str]) -> None:
    sys.argv = ["hf_trainer.py", *words]
    hf_trainer.main()
    dist.destroy_process_group()  # so that nobody gets these ranks again: accelerate keeps what it knows of them


@pytest.mark.parametrize(("dense", "parts"), [("replicated", 1), ("sharded", 2)])
def test_trainer_trains_a_parallel_model_as_it_trains_a_plain_one(
    dense: str, parts: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MASTER_ADDR", "localhost")  # which accelerate wants to see, and nobody uses
    monkeypatch.setenv("MASTER_PORT", "29500")
    run_ranks(run_example, 2, arguments(tmp_path, dense, parts))
    check(tmp_path, parts)


@pytest.mark.slow
def test_the_command_of_the_example(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "hf_trainer.py"), *arguments(tmp_path, "replicated", 1)]
    paths = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    check(tmp_path, 1)


def check(tmp_path: Path, parts: int) -> None:
    log = json.loads((tmp_path / "log.json").read_text())
    expected, model = plain(tmp_path / "plain", parts)
    losses = [(r["loss"], r["grad_norm"]) for r in log if "loss" in r]
    assert len(losses) == 3
    assert losses[2][0] < losses[0][0] - 0.1
    for (loss, norm), record in zip(losses, [r for r in expected if "loss" in r], strict=True):
        assert loss == pytest.approx(record["loss"], rel=1e-5)
        assert norm == pytest.approx(record["grad_norm"], rel=1e-4)
    (found,), (wanted,) = ([r["eval_loss"] for r in records if "eval_loss" in r] for records in (log, expected))
    assert found == pytest.approx(wanted, rel=1e-5)
    trained = AutoModelForCausalLM.from_pretrained(tmp_path / "model").state_dict()
    for name, weight in model.state_dict().items():
        # Adam's first steps turn gradients near zero, whose signs are rounding, into whole steps: few and small.
        off = (trained[name] - weight).abs()
        assert float(off.max()) < 5e-3 and float((off > 1e-5).float().mean()) < 0.02, name
