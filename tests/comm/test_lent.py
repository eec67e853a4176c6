"""A group lent by another program: the same rows and counts, and nothing sent twice where a checkpoint keeps it."""

from __future__ import annotations

import functools

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from luffy.comm import Comm, RowExchange, TrafficMeter, all_to_all_rows, build_mesh
from luffy.comm.lent import LentComm, mesh_of_group
from luffy.comm.meter import by_direction
from luffy.testing import run_ranks

_KEPT = [torch.ops._c10d_functional.all_to_all_single.default]


def _exchanged(rank: int, lent: bool, checkpointed: str) -> tuple[list, list, dict[str, int]]:
    """Rank r sends r + 1 + peer rows to each peer, twice over: (outputs, gradients, bytes)."""
    world = dist.get_world_size()
    if lent:
        mesh = mesh_of_group(init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)))
        comm: Comm = LentComm(mesh, TrafficMeter(mesh.rank, mesh.node_of_rank))
    else:
        comm = Comm.create(build_mesh(torch.device("cpu")))
    out_splits = [0 if r == rank else rank + 1 + r for r in range(world)]
    gathered = comm.all_gather_ep(torch.tensor(out_splits, dtype=torch.int32))
    exchange = RowExchange(comm, tuple(gathered[rank].tolist()), tuple(gathered[:, rank].tolist()))
    x = torch.randn(sum(out_splits), 3, generator=torch.Generator().manual_seed(rank)).requires_grad_()

    def there_and_back(rows: Tensor) -> Tensor:
        names = {"directions": ["dispatch"], "backward_directions": ["dispatch_backward"]}
        (there,) = all_to_all_rows([rows.sin()], exchange, **names)
        names = {"directions": ["combine"], "backward_directions": ["combine_backward"]}
        (back,) = all_to_all_rows([there * (rank + 2)], exchange.reversed(), **names)
        return back.cos()

    contexts = functools.partial(create_selective_checkpoint_contexts, _KEPT)
    if checkpointed == "selective":
        out = checkpoint(there_and_back, x, use_reentrant=False, context_fn=contexts)
    elif checkpointed == "full":
        out = checkpoint(there_and_back, x, use_reentrant=False)
    else:
        out = there_and_back(x)
    out.sum().backward()
    return out.tolist(), x.grad.tolist(), by_direction(comm.meter.take())


def test_a_checkpoint_that_keeps_rows_sends_none_again_and_the_meter_knows() -> None:
    plain = run_ranks(_exchanged, 4, False, "none")
    for way, times in (("none", 1), ("selective", 1), ("full", 2)):
        for rank, (mine, theirs) in enumerate(zip(run_ranks(_exchanged, 4, True, way), plain, strict=True)):
            np.testing.assert_array_equal(mine[0], theirs[0])
            np.testing.assert_array_equal(mine[1], theirs[1])
            sent, expected = mine[2], theirs[2]
            rows = sum(rank + 1 + r for r in range(4) if r != rank)
            assert expected["dispatch"] == expected["dispatch_backward"] == rows * 12
            # A checkpoint may stop once it has what the backward pass asked for; dispatch comes first.
            assert sent["dispatch"] == times * expected["dispatch"], way
            assert sent["combine"] in (expected["combine"], times * expected["combine"]), way
            for name in ("dispatch_backward", "combine_backward", "control"):
                assert sent[name] == expected[name], (way, name)


def _numbered(rank: int) -> tuple[int, int, list[int], list[int]]:
    world = init_device_mesh("cpu", (2, 2), mesh_dim_names=("ep", "other"))  # groups of ranks that are not neighbours
    mesh = mesh_of_group(world["ep"])
    comm = LentComm(mesh, TrafficMeter(mesh.rank, mesh.node_of_rank))
    return mesh.rank, mesh.world_size, comm.all_gather_world(torch.tensor([rank])).flatten().tolist(), mesh.ep_ranks


def test_ranks_are_numbered_within_a_group_of_any_ranks() -> None:
    found = run_ranks(_numbered, 4)
    assert found == [(0, 2, [0, 2], [0, 1]), (0, 2, [1, 3], [0, 1]), (1, 2, [0, 2], [0, 1]), (1, 2, [1, 3], [0, 1])]
