"""Plain PyTorch: examples/plain_pytorch.py with and without Luffy; DDP and FSDP2 of the user's own around a block."""

from __future__ import annotations

import os
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

import luffy
from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.model import expert_parameters
from luffy.testing import run_ranks
from tests.model.test_from_module import D, Ungated, made, whole_experts

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "examples" / "plain_pytorch.py"


def start(*command: str) -> subprocess.Popen[str]:
    env = {n: v for n, v in os.environ.items() if n not in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], env=env, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )


def losses(process: subprocess.Popen[str]) -> list[float]:
    out, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return [float(x) for x in re.findall(r"loss ([0-9.]+)", out)]


def test_the_example_gives_the_losses_of_the_original_code(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = [str(SCRIPT), "--dtype", "float64", "--out", str(tmp_path)]
    original = start(*options)
    spread = start("-m", "torch.distributed.run", "--nproc-per-node", "2", "--master-port", port, *options)
    expected, found = losses(original), losses(spread)
    assert len(expected) == 13 and expected[-2] < expected[0] - 1
    assert found == pytest.approx(expected, abs=2e-9)
    assert (tmp_path / "model.safetensors").exists() and (tmp_path / "checkpoint").is_dir()


def test_the_documentation_quotes_the_example() -> None:
    quoted = re.search(r"```python\n(.*?)```", (ROOT / "docs" / "own_model.md").read_text("utf-8"), re.DOTALL)
    assert quoted is not None
    script = SCRIPT.read_text("utf-8")
    assert [line for line in map(str.strip, quoted[1].splitlines()) if line != "..." and line not in script] == []


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.moe, self.last = nn.Linear(D, D), made(Ungated), nn.Linear(D, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        return self.last(x + self.moe(x)).square().mean()


def build() -> Net:
    net = Net()
    torch.manual_seed(5)
    for linear in (net.first, net.last):
        nn.init.normal_(linear.weight)
        nn.init.normal_(linear.bias)
    return net.double()


def rows() -> Tensor:
    return torch.randn(4, 3, D, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


def wrapped(rank: int, kind: str) -> None:
    mesh = build_mesh(torch.device("cpu"))
    whole = build()
    whole(rows()).backward()
    net = build()
    net.moe = block = luffy.MoEBlock.from_module(net.moe, mesh)
    experts = expert_parameters(net)
    # docs/own_model.md: the wrapper takes means over ranks, experts get sums, so these are divided here.
    for name, p in net.named_parameters():
        if name in experts:
            p.register_hook(lambda grad: grad / mesh.world_size)
    model: Any
    if kind == "ddp":
        DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(net, list(experts))
        model = DistributedDataParallel(net)
    else:
        ignored = {p for n, p in net.named_parameters() if n in experts}
        model = fully_shard(net, mesh=mesh.world_mesh, ignored_params=ignored)
    for _ in range(2):
        model.zero_grad()
        model(rows().chunk(2)[rank]).backward()
    expected = {n: p.grad for n, p in whole.named_parameters() if not n.startswith("moe.")}
    expected["moe.moe.router.weight"] = whole.moe.gate.weight.grad
    found = {n: p.grad for n, p in net.named_parameters() if n not in experts}
    assert found.keys() == expected.keys()
    for name, grad in found.items():
        full = grad.full_tensor() if isinstance(grad, DTensor) else grad
        torch.testing.assert_close(full, expected[name], rtol=1e-10, atol=1e-12, msg=name)
    for name, grad in whole_experts(whole.moe).items():
        own = getattr(block.moe.experts, name).grad
        assert not isinstance(own, DTensor)
        torch.testing.assert_close(block.runtime.comm.all_gather_ep(own).flatten(0, 1), grad, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("kind", ["ddp", "fsdp2"])
def test_data_parallelism_of_ones_own(kind: str) -> None:
    run_ranks(wrapped, 2, kind)


def in_a_users_mesh(rank: int) -> None:
    """A mesh that the program made, under names of its own; no group beyond its own."""
    theirs = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicas", "experts"))
    before = len(dist.distributed_c10d._world.pg_map)
    mesh = luffy.use_mesh(theirs)
    assert len(dist.distributed_c10d._world.pg_map) == before
    assert mesh.ep_group is theirs.get_group("experts") and mesh.dp_group is theirs.get_group("replicas")
    assert (mesh.dp_rank, mesh.ep_rank) == tuple(theirs.get_coordinate() or ())
    whole, net = build(), build()
    whole(rows()).backward()
    net.moe = block = luffy.MoEBlock.from_module(net.moe, mesh)
    sync = luffy.GradientSync(net, block.runtime.comm)
    (sync(rows()[rank : rank + 1]) / 4).backward()
    sync.finish()
    torch.testing.assert_close(net.first.weight.grad, whole.first.weight.grad, rtol=1e-10, atol=1e-12)
    for name, grad in whole_experts(whole.moe).items():
        own = getattr(block.moe.experts, name).grad
        torch.testing.assert_close(block.runtime.comm.all_gather_ep(own).flatten(0, 1), grad, rtol=1e-10, atol=1e-12)
    for other in (mesh.world_mesh, init_device_mesh("cpu", (2, 2, 1))):
        with pytest.raises(UserError, match="not all ranks in order"):
            luffy.use_mesh(other)


def test_experts_are_a_dimension_of_the_users_mesh() -> None:
    run_ranks(in_a_users_mesh, 4)
