"""The kernel that chooses representatives, and a condensed model, on a GPU."""

import os

import pytest
import torch

from luffy.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dxg"), reason="no GPU"),
]


def _kernel(rank: int) -> int:
    from tests.kernels.windows import check

    return check("cuda", (torch.float32, torch.bfloat16), (16, 32, 64, 128), (24, 80, 768))


def test_the_kernel_agrees_with_its_reference():
    assert run_ranks(_kernel, 1)[0] > 300
