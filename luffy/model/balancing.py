"""Loss-free balancing (arXiv 2408.15664): a bias of the choice that follows the load of whole steps.

Works in any loop, around any model that holds MoE layers:

    bias = LossFreeBias(model, comm)
    ...                       # forward and backward, as many micro-batches as a step has
    optimizer.step()
    bias.step()

Routers count what they choose in forward passes that train. So the load is that of all micro-batches of the step, on
all ranks, however it is divided.
"""

from __future__ import annotations

import torch
from torch import nn

from luffy.comm import Comm
from luffy.model.router import RouterBase


class LossFreeBias:
    """Moves the bias of every router that has a `bias_update_rate`; every rank makes one and calls `step`."""

    def __init__(self, model: nn.Module, comm: Comm) -> None:
        modules = (m for m in model.modules() if isinstance(m, RouterBase))
        self.routers, self.comm = [m for m in modules if m.config.bias_update_rate > 0], comm

    def forget(self) -> None:
        """Drop what was counted since the last call: a step that made no update."""
        for router in self.routers:
            router.take_chosen()

    @torch.no_grad()
    def step(self) -> None:
        """Raise the bias of experts that were chosen less than the mean since the last call, lower that of the others:

        b_e += rate * sign(mean load - load_e).
        """
        if not self.routers:
            return
        counts = self.comm.all_reduce(torch.cat([r.take_chosen() for r in self.routers]))
        for router, load in zip(self.routers, counts.split([r.config.num_experts for r in self.routers]), strict=True):
            wide = load.double()
            router.raise_bias(router.config.bias_update_rate * torch.sign(wide.mean() - wide))
