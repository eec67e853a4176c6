"""Peers for real: two ranks, a few steps, beside Luffy's `vanilla` on the same data and seed."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.peers.common import check_package
from benchmarks.peers.registry import get_peer
from luffy.errors import UserError
from luffy.report.runs import BYTE_KINDS, read_metrics

ROOT = Path(__file__).resolve().parents[2]
TOKEN_ROWS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
VOCAB_SIZE, STEPS = 300, 6


@pytest.fixture(scope="module")
def common(corpus: dict[str, str]) -> list[str]:
    """Options of every run here, with a small corpus. Without auxiliary losses: each system has its own."""
    shape = "--layers 2 --hidden-size 32 --heads 2 --experts 4 --expert-hidden-size 48 --sequence-length 48"
    rest = f"--device cpu --vocab-size {VOCAB_SIZE} --batch-size 8 --steps {STEPS} --ranks 2 --lr 3e-3 --warmup-steps 1"
    losses = "--balance-loss 0 --z-loss 0 --eval-every 0 --eval-batches 2"
    where = ["--data", corpus["data"], "--cache-dir", corpus["cache_dir"]]
    return [*f"{shape} {rest} {losses}".split(), *where]


def run(module: str, out: Path, arguments: list[str]) -> tuple[list[dict], dict, str]:
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", module, *arguments, "--out", str(out)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-3000:]
    return read_metrics(out / "metrics.jsonl"), json.loads((out / "summary.json").read_text()), done.stdout


@pytest.fixture(scope="module")
def vanilla(common: list[str], tmp_path_factory: pytest.TempPathFactory) -> tuple[list[dict], dict]:
    out = tmp_path_factory.mktemp("vanilla")
    arguments = ["train", "--recipe", "vanilla", "--no-tensorboard", "--checkpoint-every", "0", *common]
    return run("luffy.train.cli", out, arguments)[:2]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["hf_ep", "hf_ep_layer", "deepspeed"])
def test_a_peer_beside_vanilla(name: str, common: list[str], vanilla: tuple[list[dict], dict], tmp_path: Path) -> None:
    try:
        check_package(get_peer(name))
    except UserError as error:
        pytest.skip(str(error))
    records, summary, said = run("benchmarks.peers", tmp_path, ["run", "--peer", name, "--audit-bytes", *common])
    theirs, ours = records, vanilla[0]

    # The files are those of `luffy train`, and say what differs; one line is printed.
    assert [r["step"] for r in theirs] == list(range(1, STEPS + 1))
    assert [r["tokens"] for r in theirs] == [r["tokens"] for r in ours]
    assert [r["lr"] for r in theirs] == [r["lr"] for r in ours]
    assert all(tuple(r["bytes"]) == BYTE_KINDS and r["seconds"] > 0 for r in theirs)
    assert summary.keys() >= vanilla[1].keys() - {"attention_fit", "traffic"}
    assert summary["recipe"] == name and summary["world_size"] == 2 and summary["steps"] == STEPS
    assert summary["step_seconds_median"] > 0 and summary["peak_memory_bytes"] > 1e7
    assert summary["differs"]["model"] and summary["peer"]["version"]
    assert said.count("\n") == 1 and said.startswith(f"{name}: {STEPS} steps")
    assert not (tmp_path / "initial-weights").exists()

    # It learns, from about ln V downwards.
    assert theirs[0]["loss"] == pytest.approx(math.log(VOCAB_SIZE), abs=0.05)
    assert summary["valid_loss"] < theirs[0]["loss"] - 0.1

    rows = [[sum(r["bytes"][k] for k in TOKEN_ROWS) for r in run_] for run_ in (theirs, ours)]
    for r in theirs:  # what goes there comes back, in both passes
        assert len({r["bytes"][k] for k in TOKEN_ROWS}) == 1 and r["bytes"]["dispatch"] > 0
    if name == "hf_ep":
        # Another model, so other choices; the same wire. Half of all pairs leave a rank of two.
        assert sum(rows[0]) == pytest.approx(sum(rows[1]), rel=0.2)
        return
    # The same function: losses, norms and gradients' bytes agree at every step.
    for a, b in zip(theirs, ours, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=2e-5)
        assert a["grad_norm"] == pytest.approx(b["grad_norm"], rel=2e-4)
        assert a["bytes"]["gradients"] == b["bytes"]["gradients"] > 0
    assert summary["valid_loss"] == pytest.approx(vanilla[1]["valid_loss"], rel=2e-5)
    if name == "hf_ep_layer":
        assert rows[0][0] == rows[1][0]  # pair by pair
        assert sum(rows[0]) == pytest.approx(sum(rows[1]), rel=0.01)  # later a tie may fall the other way
    else:
        assert all(a > b for a, b in zip(*rows, strict=True))  # buffers of equal size: padding travels too


@pytest.mark.slow
def test_peers_in_luffys_transformer_begin_with_given_weights(common: list[str], tmp_path: Path) -> None:
    trained = tmp_path / "trained"
    ours = ["train", "--recipe", "vanilla", "--no-tensorboard", "--checkpoint-every", "0", *common]
    run("luffy.train.cli", trained, [*ours, "--export"])
    begin = ["--start-weights", str(trained / "model.safetensors"), "--steps", "2"]
    expected = [r["loss"] for r in run("luffy.train.cli", tmp_path / "ours", [*ours, *begin])[0]]
    assert expected[0] < math.log(VOCAB_SIZE) - 0.1
    for name in ("hf_ep_layer", "deepspeed"):
        try:
            check_package(get_peer(name))
        except UserError:
            continue
        theirs = run("benchmarks.peers", tmp_path / name, ["run", "--peer", name, *common, *begin])[0]
        assert [r["loss"] for r in theirs] == pytest.approx(expected, rel=2e-5)
