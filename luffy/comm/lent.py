"""An expert-parallel group that another program has made, and collectives that its checkpointing can save.

Selective activation checkpointing keeps the outputs of the operators that it is told of, torch's functional all-to-all
among them, and computes the rest again. `LentComm` therefore sends everything by that operator: where its output was
kept nothing is sent a second time, and the meter counts what was really sent.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch._C._distributed_c10d import _get_work_registry_size
from torch.distributed.device_mesh import DeviceMesh

from luffy.comm.collectives import Comm
from luffy.comm.mesh import Mesh, current_device


def mesh_of_group(ep_mesh: DeviceMesh) -> Mesh:
    """The ranks of `ep_mesh`, of one dimension, as a world of their own; no group is made.

    Ranks are numbered within the group, whatever they are in the program's world.
    """
    group, ranks = ep_mesh.get_group(), dist.get_process_group_ranks(ep_mesh.get_group())
    per_node = int(os.environ.get("LOCAL_WORLD_SIZE", dist.get_world_size()))
    rank, size = dist.get_rank(group), len(ranks)
    nobody = cast(Any, None)  # no data-parallel copies within the group
    return Mesh(
        device=current_device(ep_mesh.device_type), device_mesh=ep_mesh, world_mesh=ep_mesh,
        world_group=group, ep_group=group, dp_group=nobody,
        rank=rank, world_size=size, ep_rank=rank, ep_size=size, dp_rank=0, dp_size=1,
        node_of_rank=tuple(r // per_node for r in ranks), writes=dist.get_rank() == 0,
    )  # fmt: skip


class _Arriving:
    """A functional collective under way."""

    def __init__(self, out: Any) -> None:
        self.out = out

    def is_completed(self) -> bool:
        return False

    def wait(self) -> None:
        self.out.wait()


@dataclass(frozen=True)
class LentComm(Comm):
    """A `Comm` whose rows and counts a checkpointed region may keep; see the module's docstring."""

    def start_rows(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], count: Callable[[], None]
    ) -> tuple[Tensor, Any]:
        before = _get_work_registry_size()
        out: Any = functional.all_to_all_single(send, list(output_splits), list(input_splits), self.mesh.ep_group)
        if _get_work_registry_size() > before:  # else the answer of the forward pass was at hand
            count()
        return out.elem, _Arriving(out)

    def _all_gather(self, tensor: Tensor, group: dist.ProcessGroup, ranks: Sequence[int], direction: str) -> Tensor:
        n = len(ranks)
        if n == 1:
            return tensor.unsqueeze(0)
        flat = tensor.contiguous().view(-1).view(torch.uint8)
        out, arriving = self.start_rows(
            flat.expand(n, -1).contiguous(), [1] * n, [1] * n,
            lambda: self.meter.all_gather(direction, ranks, tensor.nbytes),
        )  # fmt: skip
        arriving.wait()
        return out.view(tensor.dtype).reshape(n, *tensor.shape)


def program_size() -> int:
    """Ranks of the whole program, whatever groups they form."""
    return dist.get_world_size() if dist.is_initialized() else 1
