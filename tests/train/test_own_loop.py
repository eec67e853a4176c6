"""GradientSync in a loop of one's own: its habits give the gradients of one process, or an error."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import luffy
from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.model import expert_parameters
from luffy.testing import gather_full, run_ranks

WIDTH, ROWS, LENGTH = 8, 8, 3


class Net(nn.Module):
    """Two replicated maps, one of them in a module that a user has called `experts`, and a block with real ones."""

    def __init__(self, mesh: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.side = nn.ModuleDict({"experts": nn.ModuleDict({"w_in": nn.Linear(WIDTH, WIDTH)})})
        self.mix = luffy.MoEBlock(WIDTH, 12, 4, mesh=mesh)
        self.runtime = self.mix.runtime
        self.out = nn.Linear(WIDTH, 5)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.mix(torch.tanh(self.side["experts"]["w_in"](x)))).square().sum()


def data() -> Tensor:
    return torch.randn(ROWS, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def two_parts(net: Net, mesh: Any) -> tuple[Tensor, Tensor]:
    mine = data()[mesh.rank * ROWS // mesh.world_size : (mesh.rank + 1) * ROWS // mesh.world_size]
    return mine[: len(mine) // 2], mine[len(mine) // 2 :]


def once(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    sync(torch.cat([a, b])).backward()
    sync.finish()


def habit(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        sync(x).backward()
    sync.finish()


def finish_each(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        sync(x).backward()
        sync.finish()


def last(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    sync(a, last=False).backward()
    sync(b).backward()
    sync.finish()


def last_comes_late(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    half = len(b) // 2
    sync(a).backward()
    sync(b[:half], last=False).backward()
    sync(b[half:]).backward()
    sync.finish()


def one_backward(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    (sync(a, last=False) + sync(b)).backward()
    sync.finish()


def zeroed(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    sync(a).backward()
    sync.finish()
    sync.model.zero_grad(set_to_none=False)
    habit(sync, a, b)


def outside(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    sync.model(torch.cat([a, b])).backward()
    sync.finish()


def never_last(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    for x in (a, b):
        sync(x, last=False).backward()
    sync.finish()


def early_clip(sync: luffy.GradientSync, a: Tensor, b: Tensor) -> None:
    sync(torch.cat([a, b])).backward()
    sync.clip(1.0)


RIGHT = (once, habit, finish_each, last, last_comes_late, one_backward, zeroed)
REFUSED = {outside: "not summed over ranks", never_last: "not summed over ranks", early_clip: "finish"}


def gradients(net: Net) -> dict[str, np.ndarray]:
    """What this rank holds, experts of the whole EP group in the order of their ids."""
    mesh, experts = net.runtime.comm.mesh, expert_parameters(net)
    found = {}
    for name, p in net.named_parameters():
        assert p.grad is not None
        found[name] = net.runtime.comm.all_gather_ep(p.grad).flatten(0, 1) if name in experts else p.grad
    assert mesh.ep_size * len(experts)
    return {n: g.numpy().copy() for n, g in found.items()}


def loops(rank: int, ep_size: int) -> dict[str, Any]:
    mesh = build_mesh(torch.device("cpu"), ep_size)
    results: dict[str, Any] = {}
    for way in RIGHT:
        net = Net(mesh).double()
        sync = luffy.GradientSync(net, net.runtime.comm)
        way(sync, *two_parts(net, mesh))
        results[way.__name__] = gradients(net), float(sync.clip(0.0))
    for way, words in REFUSED.items() if mesh.world_size > 1 else ():
        net = Net(mesh).double()
        sync = luffy.GradientSync(net, net.runtime.comm)
        with pytest.raises(UserError, match=words):
            way(sync, *two_parts(net, mesh))
    return results


def test_habits_of_loops() -> None:
    expected, norm = run_ranks(loops, 1, 1)[0]["once"]
    for ranks, ep_size in ((2, 2), (4, 2)):
        for results in run_ranks(loops, ranks, ep_size):
            for way, (found, its_norm) in results.items():
                assert its_norm == pytest.approx(norm, rel=1e-12), way
                for name, gradient in expected.items():
                    assert np.allclose(found[name], gradient, rtol=1e-10, atol=1e-12), (way, name)


def owned(rank: int) -> None:
    net = Net(build_mesh(torch.device("cpu"))).double()
    assert set(expert_parameters(net)) == {n for n, _ in net.named_parameters() if n.startswith("mix.moe.experts.")}
    assert set(gather_full(net)) == {n for n, _ in net.named_parameters()}  # type: ignore[arg-type]


def test_a_module_called_experts_is_replicated() -> None:
    run_ranks(owned, 1)
