"""Kernels in Triton's interpreter: in a process of its own, since Triton reads the switch when it is imported."""

import os
import subprocess
import sys

import pytest


def interpret(module: str, timeout: float = 600) -> str:
    """What `python -m tests.kernels.MODULE` prints; the test fails with its last words if it fails."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-m", f"tests.kernels.{module}"], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=timeout,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout
