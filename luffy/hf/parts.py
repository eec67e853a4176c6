"""The library's parts as a MoELayer wants them: its gate as a router, its stacked experts as this rank's share of them.

Weights may be kept in a wider dtype than the stream (float32 beside bfloat16): `call_in` then computes a library module
with its weights rounded to the stream's dtype, which is what the library does when it holds the model in that dtype,
while gradients arrive in the weights' own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from luffy.comm.sharding import is_sharded
from luffy.config import RouterConfig
from luffy.data.batch import Layout
from luffy.hf.families import Activation, Family
from luffy.model.experts import Experts
from luffy.model.router import RouterBase, RouterStats, Routing, router_stats


def call_in(dtype: torch.dtype, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with its floating parameters cast to `dtype`."""
    cast = {}
    for name, p in module.named_parameters():
        assert not is_sharded(p), f"{name} is sharded, and nobody gathered it"
        if p.is_floating_point() and p.dtype != dtype:
            cast[name] = p.to(dtype)
    return functional_call(module, cast, args, kwargs) if cast else module(*args, **kwargs)


class SharedExperts(nn.Module):
    """The library's shared experts, in their input's dtype; times the sigmoid of their gate, if they have one."""

    def __init__(self, module: nn.Module, gate: nn.Module | None) -> None:
        super().__init__()
        self.module, self.gate = module, gate

    def forward(self, x: Tensor) -> Tensor:
        y = call_in(x.dtype, self.module, x)
        return y if self.gate is None else call_in(x.dtype, self.gate, x).sigmoid() * y


class LibraryRouter(RouterBase):
    """The library's gate: what it chooses and weighs, and what that says to the auxiliary losses.

    It computes in its weights' dtype, float32 where those are kept so.
    """

    gate: Any

    def __init__(self, gate: nn.Module, config: RouterConfig, bias_buffer: str | None) -> None:
        super().__init__()
        self.gate, self.config, self.bias_buffer = gate, config, bias_buffer

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        logits, weights, ids = self.gate(x.to(self.gate.weight.dtype))
        wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
        scores = wide.softmax(-1) if self.config.score == "softmax" else wide.sigmoid()
        return wide, scores, weights.to(scores.dtype), ids

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, _, ids = self._scores(x)
        return logits, scores, ids

    def forward(self, x: Tensor, layout: Layout) -> tuple[Routing, RouterStats]:
        logits, scores, weights, ids = self._scores(x)
        return Routing(ids, weights), router_stats(logits, scores, ids, layout, self.config.score)

    def raise_bias(self, by: Tensor) -> None:
        assert self.bias_buffer is not None, "only families with a bias for the choice are given a rate"
        bias = getattr(self.gate, self.bias_buffer)
        bias.add_(by.to(bias.dtype))


class LibraryExperts(Experts):
    """This rank's rows of the library's stacked experts, under the library's names and in its layout.

    gate_up_proj [n, 2F, D] and down_proj [n, D, F]; [n, D, 2F] and [n, F, D] where `transposed`; biases [n, ..].
    """

    gate_up_proj: Tensor
    down_proj: Tensor

    def __init__(self, stacked: nn.Module, family: Family, activate: Activation, num_local: int, first: int) -> None:
        super().__init__()
        self.num_local, self.transposed, self.activation = num_local, family.transposed, activate
        names = ["gate_up_proj", "down_proj"]
        names += ["gate_up_proj_bias", "down_proj_bias"] if family.biases else []
        for name in names:
            whole = getattr(stacked, name)
            share = whole.detach()[first : first + num_local].clone()
            self.register_parameter(name, nn.Parameter(share, requires_grad=whole.requires_grad))

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        w_in, w_out = self.gate_up_proj, self.down_proj
        if not self.transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        return w_in, w_out, getattr(self, "gate_up_proj_bias", None), getattr(self, "down_proj_bias", None)


def lent(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer's norm as a MoELayer borrows it."""
    return lambda rows: call_in(rows.dtype, norm, rows)
