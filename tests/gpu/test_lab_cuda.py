"""Two ranks of a lab on one GPU: their kernels run under one service, which ends with them."""

from __future__ import annotations

import subprocess
import sys

import pytest

from luffy.lab.gpus import PROGRAM

pytestmark = pytest.mark.gpu

RANK = f"""
import subprocess, torch
torch.ones(1000, device="cuda").sum().item()
servers = subprocess.run(["{PROGRAM}"], input="get_server_list", capture_output=True, text=True).stdout.split()
print("servers:", len(servers), flush=True)
"""


def test_ranks_share_the_gpu_side_by_side(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    lab = [sys.executable, "-m", "luffy.train.cli", "lab", "--ranks", "2", "--", sys.executable, "-c", RANK]
    done = subprocess.run(lab, capture_output=True, text=True, timeout=120)
    if "needs root" in done.stderr or "refuses" in done.stderr or "kernel has no" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    assert "2 ranks share 1 GPU side by side" in done.stderr
    assert done.stdout.count("servers: 1") == 2
    assert subprocess.run(["pgrep", "-f", "nvidia-cuda-mps"], capture_output=True).returncode == 1
