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
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn.parallel import DistributedDataParallel

import luffy
from luffy.comm import Comm, build_mesh
from luffy.comm.sharding import is_split_apart
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


@pytest.mark.slow
def test_the_example_gives_the_losses_of_the_original_code(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    options = [str(SCRIPT), "--dtype", "float64", "--out", str(tmp_path)]
    (tmp_path / "checkpoint").mkdir()
    (tmp_path / "checkpoint" / "of an earlier run").touch()
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
        with pytest.raises(UserError, match="is not ranks in order"):
            luffy.use_mesh(other)


def test_experts_are_a_dimension_of_the_users_mesh() -> None:
    run_ranks(in_a_users_mesh, 4)


class Attending(nn.Module):
    """One head-wise linear map in and out, as tensor parallelism splits attention; then a MoE layer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.norm, self.up, self.down = nn.LayerNorm(D), nn.Linear(D, 4 * D), nn.Linear(4 * D, D)
        self.moe: nn.Module = made(Ungated)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.down(torch.tanh(self.up(self.norm(x))))
        return (x + self.moe(x)).square().sum()


def beside_tensor_parallelism(rank: int, folder: str) -> None:
    """(ep, tp) = (2, 2): the maps are split over tp, experts over ep; loss, gradients, norm, file as of one process."""
    theirs = init_device_mesh("cpu", (1, 2, 2), mesh_dim_names=("dp", "ep", "tp"))
    mesh = luffy.use_mesh(theirs["dp", "ep"])
    assert (mesh.world_size, mesh.ep_size, mesh.rank) == (2, 2, rank // 2) and mesh.node_of_rank == (0, 0)
    whole, net = Attending().double(), Attending().double()
    loss = whole(rows())
    loss.backward()
    parallelize_module(net, theirs["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    net.moe = block = luffy.MoEBlock.from_module(net.moe, mesh)
    comm = block.runtime.comm
    for form in ("model", "int8"):
        sync = luffy.GradientSync(net, comm, form)
        half = sync(rows().chunk(2)[mesh.rank])
        half.backward()
        sync.finish()
        assert comm.all_reduce(half.detach().clone()).item() == pytest.approx(loss.item(), rel=1e-12)
        exact = 1e-10 if form == "model" else 0.05
        for name in ("norm.weight", "up.weight", "up.bias", "down.weight", "down.bias"):
            grad, expected = net.get_parameter(name).grad, whole.get_parameter(name).grad
            assert grad is not None and expected is not None
            found = grad.full_tensor() if isinstance(grad, DTensor) else grad
            assert (found - expected).norm() <= exact * expected.norm(), name
        if form == "model":
            for name, expected in whole_experts(whole.moe).items():
                own = getattr(block.moe.experts, name).grad
                torch.testing.assert_close(comm.all_gather_ep(own).flatten(0, 1), expected, rtol=1e-10, atol=1e-12)
            norm = torch.nn.utils.get_total_norm([p.grad for p in whole.parameters() if p.grad is not None])
            assert sync.clip(0).item() == pytest.approx(norm.item(), rel=1e-10)
        net.zero_grad()
        net = build_again(net, theirs, mesh) if form == "model" else net
        comm = net.moe.runtime.comm  # type: ignore[union-attr,assignment]
    path = Path(folder, "weights.safetensors")
    luffy.save_weights(path, net)
    other = build_again(net, theirs, mesh)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    dist.barrier()
    luffy.load_weights(path, other)
    for (name, a), b in zip(net.named_parameters(), other.parameters(), strict=True):
        a, b = (t.full_tensor() if isinstance(t, DTensor) else t for t in (a.detach(), b.detach()))
        assert torch.equal(a, b), name
    alone = init_device_mesh("cpu", (1, 1, 4), mesh_dim_names=("dp", "ep", "tp"))
    only_split = Attending().double()
    parallelize_module(only_split, alone["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    only_split.moe = luffy.MoEBlock.from_module(only_split.moe, luffy.use_mesh(alone["dp", "ep"]))
    sync = luffy.GradientSync(only_split, only_split.moe.runtime.comm)
    sync(rows()).backward()
    sync.finish()
    assert sync.clip(0).item() == pytest.approx(norm.item(), rel=1e-10)  # of all parts, though this mesh has one rank
    half_split = distribute_tensor(torch.ones(4, 4), theirs["tp"])
    with pytest.raises(UserError, match="some of the 4 ranks"):
        is_split_apart(half_split, Comm.create(build_mesh(torch.device("cpu"))))


def build_again(net: nn.Module, theirs: Any, mesh: Any) -> nn.Module:
    fresh = Attending().double()
    parallelize_module(fresh, theirs["tp"], {"up": ColwiseParallel(), "down": RowwiseParallel()})
    fresh.moe = luffy.MoEBlock.from_module(fresh.moe, mesh)
    return fresh


def test_tensor_parallelism_of_ones_own(tmp_path: Path) -> None:
    run_ranks(beside_tensor_parallelism, 4, str(tmp_path))


def compiled(rank: int) -> None:
    """torch.compile of a whole model: what is around the block is compiled, the block runs as it is."""
    mesh = build_mesh(torch.device("cpu"))
    plain, net = build(), build()
    plain.moe, net.moe = (luffy.MoEBlock.from_module(n.moe, mesh) for n in (plain, net))
    quick = torch.compile(net, backend="aot_eager")
    first, second = (luffy.GradientSync(m, n.moe.runtime.comm) for m, n in ((plain, plain), (quick, net)))  # type: ignore
    torch._dynamo.utils.counters.clear()
    for some in (rows(), rows()[rank:], rows()[:1]):
        for sync in (first, second):
            sync.model.zero_grad()
            sync(some).backward()
            sync.finish()
        for (name, a), b in zip(plain.named_parameters(), net.parameters(), strict=True):
            torch.testing.assert_close(b.grad, a.grad, rtol=1e-12, atol=1e-12, msg=name)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] >= 2  # before the block and behind it


@pytest.mark.slow
def test_compiled_around_a_block() -> None:
    run_ranks(compiled, 2)
