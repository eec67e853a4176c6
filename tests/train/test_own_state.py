"""A model of one's own is kept and continued at any number of ranks; one rank's dict is no other rank's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import luffy
from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.model import expert_parameters
from luffy.testing import run_ranks
from luffy.train.checkpoint import everyone
from luffy.train.rehoming import move_experts

from .test_own_loop import Net, data


def step(net: Net, optimizer: torch.optim.Optimizer) -> float:
    mesh = net.runtime.comm.mesh
    sync = luffy.GradientSync(net, net.runtime.comm)
    loss = sync(data().chunk(mesh.world_size)[mesh.rank])
    loss.backward()
    sync.finish()
    optimizer.step()
    optimizer.zero_grad()
    return float(net.runtime.comm.all_reduce(loss.detach().clone()))


def whole(net: Net) -> dict[str, np.ndarray]:
    experts, comm = expert_parameters(net), net.runtime.comm
    return {
        n: (comm.all_gather_ep(p.detach()).flatten(0, 1)[experts[n].slot_of_expert] if n in experts else p.detach())
        .numpy()
        .copy()
        for n, p in net.named_parameters()
    }


def made(ep_size: int | None = None) -> tuple[Net, torch.optim.Optimizer]:
    net = Net(build_mesh(torch.device("cpu"), ep_size)).double()
    return net, torch.optim.AdamW(net.parameters(), lr=0.01)


def keep(rank: int, folder: Path) -> dict[str, Any]:
    """Two steps, experts re-homed in between; kept in every way; a third step."""
    net, optimizer = made()
    step(net, optimizer)
    move_experts(net.mix.moe, optimizer, np.array([1, 0, 1, 0]), net.runtime.comm)
    step(net, optimizer)
    luffy.save_checkpoint(folder / "checkpoint", net, optimizer)
    with pytest.raises(UserError, match="not empty"):
        luffy.save_checkpoint(folder / "checkpoint", net, optimizer)
    luffy.save_weights(folder / "weights.safetensors", net)
    torch.save(net.state_dict(), folder / f"rank-{rank}.pt")
    kept = whole(net)
    return {"kept": kept, "loss": step(net, optimizer), "after": whole(net)}


def same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], exact: bool = True) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert np.allclose(found[name], value, rtol=0 if exact else 1e-9, atol=0 if exact else 1e-12), name


def go_on(rank: int, folder: Path, ep_size: int | None, expected: dict[str, Any]) -> None:
    net, optimizer = made(ep_size)
    luffy.load_weights(folder / "weights.safetensors", net)
    same(whole(net), expected["kept"])
    net, optimizer = made(ep_size)
    luffy.load_checkpoint(folder / "checkpoint", net, optimizer)
    same(whole(net), expected["kept"])
    assert step(net, optimizer) == pytest.approx(expected["loss"], rel=1e-10)
    same(whole(net), expected["after"], exact=False)


def one_ranks_dict(rank: int, folder: Path) -> None:
    net, _ = made()
    mesh = net.runtime.comm.mesh
    for source in range(2):
        state = torch.load(folder / f"rank-{source}.pt")
        if (source, mesh.world_size) == (rank, 2):
            net.load_state_dict(state)  # its own is fine, re-homed experts included
        else:
            with pytest.raises(UserError, match=f"experts of rank {rank} of {mesh.world_size}.*rank {source} of 2"):
                net.load_state_dict(state)
            with pytest.raises(UserError, match="state_dict"):
                net.load_state_dict(state, strict=False)
    if mesh.world_size > 1:
        bare = {k: v for k, v in net.state_dict().items() if "expert_parallel_rank" not in k}
        with pytest.raises(UserError, match="unknown rank"):
            net.load_state_dict(bare)
    again, _ = made()
    again.load_state_dict(net.state_dict())
    same(whole(again), whole(net))


def test_kept_and_continued_at_other_numbers_of_ranks(tmp_path: Path) -> None:
    expected = run_ranks(keep, 2, tmp_path)[0]
    for ranks, ep_size in ((1, None), (2, None), (4, None), (4, 2)):
        run_ranks(go_on, ranks, tmp_path, ep_size, expected)
    for ranks in (1, 2, 4):
        run_ranks(one_ranks_dict, ranks, tmp_path)


def refused(rank: int, folder: Path) -> list[str]:
    """What every rank hears where rank 0 cannot write, and what others hear of an error that is no user's mistake."""
    net, optimizer = made()
    said = []
    for action in (
        lambda: luffy.save_weights(folder / "missing" / "weights.safetensors", net),
        lambda: luffy.save_checkpoint(folder / "file", net, optimizer),
    ):
        with pytest.raises(UserError) as caught:
            action()
        said.append(str(caught.value))
    with pytest.raises(ZeroDivisionError if rank == 0 else RuntimeError, match="by zero"):
        everyone(net.runtime.comm.mesh, lambda: 1 // rank)
    return said


def test_what_one_rank_cannot_do_every_rank_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for weights, checkpoint in run_ranks(refused, 2, tmp_path):
        assert weights.startswith("save_weights: ") and "No such file" in weights
        assert checkpoint == f"save_checkpoint: {tmp_path / 'file'} is a file; name a new folder"
