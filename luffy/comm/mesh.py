"""The mesh of ranks: who shares experts with whom, and which ranks sit on the same node.

Ranks form a grid of `dp` x `ep`. Within an expert-parallel (EP) group the experts of a layer are split; the groups
are copies of each other (data parallel, DP). Every rank, in either dimension, trains on sequences of its own, so
parameters outside the experts are replicated over the whole world. EP is the inner dimension: an EP group sits on
as few nodes as it can, because its traffic is the heavy one.
"""

from __future__ import annotations

import datetime
import os
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from luffy.errors import UserError
from luffy.ranges import AT_LEAST_ONE


@dataclass(frozen=True)
class Mesh:
    """The ranks of one job as seen from one of them.

    `device_mesh` is dp x ep, `world_mesh` all ranks in a row. The world is that of this mesh: of `use_mesh` it may be a
    part of the job's ranks, and `rank` counts within it. `node_of_rank[r]` is the node of world rank r. `ep_ranks` are
    the world ranks of this EP group, in order. `writes`: this rank is the one of the whole job that writes files.
    """

    device: torch.device
    device_mesh: DeviceMesh
    world_mesh: DeviceMesh
    world_group: dist.ProcessGroup
    ep_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    rank: int
    world_size: int
    ep_rank: int
    ep_size: int
    dp_rank: int
    dp_size: int
    node_of_rank: tuple[int, ...]
    writes: bool

    @property
    def ep_ranks(self) -> list[int]:
        return [self.dp_rank * self.ep_size + r for r in range(self.ep_size)]

    @property
    def dp_ranks(self) -> list[int]:
        return [d * self.ep_size + self.ep_rank for d in range(self.dp_size)]


def init_distributed(backend: str, device: torch.device, timeout_seconds: float = 600.0) -> None:
    """Join the world that torchrun (or `run_ranks`) describes in the environment.

    `backend` is "nccl" or "gloo". A rank that never answers ends the job after `timeout_seconds` with an error
    instead of a hang.
    """
    if dist.is_initialized():
        return
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        if name not in os.environ:
            raise UserError(f"{name} is not set: start with `luffy train --ranks N` or under torchrun")
    dist.init_process_group(
        backend,
        timeout=datetime.timedelta(seconds=timeout_seconds),
        device_id=device if backend == "nccl" else None,
    )


def mesh_of_world() -> Mesh | None:
    """Of the process group that another program has made; None where there is none yet."""
    if not dist.is_initialized():
        return None
    return build_mesh(current_device("cuda" if torch.cuda.is_available() else "cpu"))


def current_device(kind: str) -> torch.device:
    """This process's device of a kind, as a DeviceMesh names it."""
    return torch.device(kind, torch.cuda.current_device()) if kind == "cuda" else torch.device(kind)


def _world_group() -> dist.ProcessGroup:
    group = dist.group.WORLD
    assert group is not None, "call init_distributed first"
    return group


def build_mesh(device: torch.device, ep_size: int | None = None, ranks_per_node: int | None = None) -> Mesh:
    """Arrange the initialised world as dp x ep.

    `ep_size` None puts the whole world in one EP group; it must divide the world. `ranks_per_node` None takes
    torchrun's LOCAL_WORLD_SIZE, or one node for all.
    """
    world_size = dist.get_world_size()
    ep_size = world_size if ep_size is None else ep_size
    if ep_size < 1 or world_size % ep_size:
        raise UserError(f"--ep-size {ep_size} does not divide the {world_size} ranks")
    AT_LEAST_ONE.check("--ranks-per-node", ranks_per_node)
    shape = (world_size // ep_size, ep_size)
    return _arranged(device, init_device_mesh(device.type, shape, mesh_dim_names=("dp", "ep")), ranks_per_node)


def use_mesh(device_mesh: DeviceMesh) -> Mesh:
    """The Mesh of a DeviceMesh [dp, ep] that a program has made itself; its groups are used.

    Whatever the two are called, experts are split over the last one. It may be a part of a larger mesh, such as
    `mesh["dp", "ep"]` of a mesh (dp, ep, tp) with tensor parallelism: ranks that differ in `tp` alone hold the same
    experts, and see the same rows. Then one group is made, of the ranks of this part. UserError where ranks are
    arranged otherwise.
    """
    ranks = device_mesh.mesh.flatten().tolist()
    if device_mesh.ndim != 2 or ranks != sorted(ranks):
        raise UserError(
            f"use_mesh: {device_mesh} is not ranks in order as (data parallel, expert parallel); make one with "
            'init_device_mesh(device, (dp, ep), mesh_dim_names=("dp", "ep")), dp may be 1, or take two of a larger one'
        )
    return _arranged(current_device(device_mesh.device_type), device_mesh, None)


def _arranged(device: torch.device, device_mesh: DeviceMesh, ranks_per_node: int | None) -> Mesh:
    """device_mesh: dp x ep."""
    dp_size, ep_size = device_mesh.shape
    ranks, world_size = device_mesh.mesh.flatten().tolist(), dp_size * ep_size
    rank, job_size = ranks.index(dist.get_rank()), dist.get_world_size()
    ranks_per_node = ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", job_size))
    if world_size == job_size:
        world_mesh, world_group = init_device_mesh(device.type, (world_size,)), _world_group()
    else:
        world_mesh = device_mesh._flatten()
        world_group = world_mesh.get_group()
    return Mesh(
        device=device,
        device_mesh=device_mesh,
        world_mesh=world_mesh,
        world_group=world_group,
        ep_group=device_mesh.get_group(1),
        dp_group=device_mesh.get_group(0),
        rank=rank,
        world_size=world_size,
        ep_rank=rank % ep_size,
        ep_size=ep_size,
        dp_rank=rank // ep_size,
        dp_size=dp_size,
        node_of_rank=tuple(r // ranks_per_node for r in ranks),
        writes=dist.get_rank() == 0,
    )
