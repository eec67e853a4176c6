"""The kernels that code rows, on a GPU."""

import os

import pytest
import torch

from luffy.comm import Comm, build_mesh
from luffy.comm.sums import GradientSums
from luffy.testing import run_ranks

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dxg"), reason="no GPU"),
]


def _kernels(rank: int, world: int) -> int:
    from tests.kernels.wired import check

    return check("cuda", (torch.float32, torch.bfloat16), (32, 50, 768, 1100), share=(rank, world))


def test_the_kernels_agree_with_their_references_to_the_bit():
    """In several processes on one GPU, since nearly all of it is compiling."""
    world = min(8, os.cpu_count() or 1)
    assert sum(run_ranks(_kernels, world, world)) > 90


def _sums(rank: int) -> list[bool]:
    """Coded sums of two ranks that share a GPU, many under way beside other work, against the host's: the same bits."""
    sizes, found = (31, 1024, 70_000, 1_000_000), {}
    for device in ("cpu", "cuda"):
        comm = Comm.create(build_mesh(torch.device(device)))
        sums = GradientSums(comm, comm.mesh.world_group, range(2), "int8")
        generator = torch.Generator().manual_seed(rank)
        tensors = [torch.randn(size, generator=generator).to(device) for size in sizes]
        work = torch.randn(1000, 1000, device=device)
        doubled = [2 * t for t in tensors]  # what is summed is still being computed
        pending = []
        for tensor in doubled:
            pending.append(sums.start(tensor))
            work = work @ work.t() / 1000
        found[device] = [future.wait().cpu() for future in pending]
    return [torch.equal(a, b) for a, b in zip(found["cpu"], found["cuda"], strict=True)]


def test_coded_sums_on_a_gpu_are_those_of_the_host():
    assert run_ranks(_sums, 2) == [[True] * 4] * 2
