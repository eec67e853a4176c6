"""The kernels that code rows, on a GPU."""

import os

import pytest
import torch

from luffy.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dxg"), reason="no GPU"),
]


def _kernels(rank: int) -> int:
    from tests.kernels.wired import check

    return check("cuda", (torch.float32, torch.bfloat16), (32, 50, 768, 1100))


def test_the_kernels_agree_with_their_references_to_the_bit():
    assert run_ranks(_kernels, 1)[0] > 90
