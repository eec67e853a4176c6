"""The small collectives, each of which reports to the traffic meter; rows have a module of their own (comm.rows)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.comm.mesh import Mesh
from luffy.comm.meter import TrafficMeter

# Renamed between releases of torch.
all_gather_flat = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
reduce_scatter_flat = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


@dataclass(frozen=True)
class Comm:
    """What the exchange needs of the network: the mesh and the meter that every collective reports to."""

    mesh: Mesh
    meter: TrafficMeter

    @classmethod
    def create(cls, mesh: Mesh) -> Comm:
        return cls(mesh, TrafficMeter(mesh.rank, mesh.node_of_rank))

    def all_reduce(self, tensor: Tensor, direction: str = "control") -> Tensor:
        """Sum over the world, in place."""
        if self.mesh.world_size > 1:
            dist.all_reduce(tensor, group=self.mesh.world_group)
            self.meter.all_reduce(direction, list(range(self.mesh.world_size)), tensor.nbytes)
        return tensor

    def all_reduce_ep(self, tensor: Tensor, direction: str = "control") -> Tensor:
        """Sum over the EP group, in place."""
        if self.mesh.ep_size > 1:
            dist.all_reduce(tensor, group=self.mesh.ep_group)
            self.meter.all_reduce(direction, self.mesh.ep_ranks, tensor.nbytes)
        return tensor

    def all_gather_world(self, tensor: Tensor, direction: str = "control") -> Tensor:
        """[n...] on each rank -> [world_size, n...] on all ranks of the world. Shapes must agree."""
        return self._all_gather(tensor, self.mesh.world_group, range(self.mesh.world_size), direction)

    def all_gather_ep(self, tensor: Tensor) -> Tensor:
        """[n...] on each rank -> [ep_size, n...] on all ranks of the EP group. Shapes must agree."""
        return self._all_gather(tensor, self.mesh.ep_group, self.mesh.ep_ranks, "control")

    def start_all_gather_ep(self, tensor: Tensor) -> Callable[[], Tensor]:
        """Begin to gather a host tensor [n...] of every rank of the EP group; the call it returns waits for it.

        Waiting does not wait for other work of the device, so that a few bytes can be compared while it computes.
        """
        mesh = self.mesh
        if mesh.ep_size == 1:
            return lambda: tensor.unsqueeze(0)
        self.meter.all_gather("control", mesh.ep_ranks, tensor.nbytes)
        on_device = dist.get_backend(mesh.ep_group) == "nccl"
        flat = (tensor.to(mesh.device) if on_device else tensor).flatten()
        out = flat.new_empty(mesh.ep_size * flat.numel())
        work = all_gather_flat(out, flat, group=mesh.ep_group, async_op=True)

        def finish() -> Tensor:
            if on_device:
                with torch.cuda.stream(torch.cuda.Stream(mesh.device)):
                    work.wait()
                    host = out.cpu()
            else:
                work.wait()
                host = out
            return host.reshape(mesh.ep_size, *tensor.shape)

        return finish

    def start_rows(
        self, send: Tensor, input_splits: Sequence[int], output_splits: Sequence[int], count: Callable[[], None]
    ) -> tuple[Tensor, Any]:
        """Begin an all-to-all of bytes [n, width] over the EP group: (what will have arrived, the work to wait for).

        count: tells the meter what is sent.
        """
        count()
        receive = send.new_empty((sum(output_splits), send.shape[1]))
        group = self.mesh.ep_group
        work = dist.all_to_all_single(
            receive, send, list(output_splits), list(input_splits), group=group, async_op=True
        )  # fmt: skip
        if dist.get_backend(group) == "gloo":  # NCCL's futures are done when the work is queued
            self.meter.watch(work)
        return receive, work

    def _all_gather(self, tensor: Tensor, group: dist.ProcessGroup, ranks: Sequence[int], direction: str) -> Tensor:
        if len(ranks) == 1:
            return tensor.unsqueeze(0)
        out = tensor.new_empty(len(ranks) * tensor.numel())
        all_gather_flat(out, tensor.contiguous().flatten(), group=group)
        self.meter.all_gather(direction, ranks, tensor.nbytes)
        return out.unflatten(0, (len(ranks), tensor.numel())).reshape(len(ranks), *tensor.shape)
