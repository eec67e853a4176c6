"""examples/torchtitan_luffy.py as its guide starts it: as torchtitan is, and with Luffy's exchange."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("torchtitan", reason="torchtitan is not installed: pip install 'luffy-moe[titan]' to test it")
pytestmark = pytest.mark.slow

ROOT = Path(__file__).resolve().parents[2]


def start(*options: str) -> subprocess.Popen[str]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    env = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port]
    command = [*launcher, str(ROOT / "examples" / "torchtitan_luffy.py"), "--model", "qwen3", "--steps", "2", *options]
    return subprocess.Popen(command, env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def losses(process: subprocess.Popen[str]) -> list[float]:
    out, errors = process.communicate(timeout=500)
    assert process.returncode == 0, errors[-3000:]
    return [json.loads(line)["loss"] for line in out.splitlines() if line.startswith("{")]


def test_both_print_the_same_losses() -> None:
    theirs, ours = start(), start("--override", "luffy.titan.exchange")
    expected, found = losses(theirs), losses(ours)
    assert len(expected) == 2 and found == pytest.approx(expected, rel=2e-3)  # experts round to bfloat16
