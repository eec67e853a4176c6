"""A reduce-scatter for gloo that moves what a reduce-scatter should.

gloo's own is an all-reduce of the whole tensor, of which each rank keeps its part: twice the bytes. A peer that shards
its gradients would pay for that on every slow link, and not because of anything that it does. Here each rank sends
every other rank that rank's part, once, and adds up what it gets.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.fsdp._fully_shard._fsdp_api import ReduceScatter

from benchmarks.peers.counting import ByteCounter


class SwappedReduceScatter(ReduceScatter):
    """For `FSDPModule.set_custom_reduce_scatter`; sums, whatever else is asked for is an error."""

    def __init__(self, counter: ByteCounter) -> None:
        self.counter = counter

    def allocate(self, size: tuple[int, ...], *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)

    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: dist.ReduceOp,
        async_op: bool = False,
    ) -> None:
        """input_tensor: [n * m], output_tensor: [m]."""
        if op != dist.ReduceOp.SUM:
            raise RuntimeError(f"this reduce-scatter only sums, and was asked for {op}")
        received = torch.empty_like(input_tensor)
        with self.counter.charging("gradients"):
            dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)


def sum_over_gloo(model: nn.Module, counter: ByteCounter) -> None:
    """Have a transformers model that is sharded by FSDP2 sum over gloo, which has no average, and divide afterwards.

    (Experts have nobody to average with.)
    """
    for name, module in model.named_modules():
        if isinstance(module, FSDPModule) and not name.endswith(".experts"):
            module.set_force_sum_reduction_for_comms(True)
            module.set_custom_reduce_scatter(SwappedReduceScatter(counter))
