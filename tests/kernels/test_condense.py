"""The fused decision what to condense, in Triton's interpreter, against the torch one."""

import os
import subprocess
import sys

import pytest


@pytest.mark.slow
def test_the_kernels_decide_as_torch_does():
    """In a process of its own, since Triton reads the switch when it is imported."""
    pytest.importorskip("triton")
    done = subprocess.run(
        [sys.executable, "-m", "tests.kernels.deciding"], env=os.environ | {"TRITON_INTERPRET": "1"},
        capture_output=True, text=True, timeout=900,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    condensed = done.stdout.split("condensed alike:")[1].split()
    assert [int(n) > least for n, least in zip(condensed, (500, 100, 30), strict=True)] == [True] * 3, condensed
