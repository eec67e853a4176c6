"""Modules that others wrote, as a MoELayer wants them: their gate as a router, their shared experts.

Weights may be kept in a wider dtype than the stream (float32 beside bfloat16): `call_in` then computes a module with
its weights rounded to the stream's dtype, which is what its library does when it holds the model in that dtype, while
gradients arrive in the weights' own.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from luffy.comm.sharding import is_sharded
from luffy.config import RouterConfig
from luffy.data.batch import Layout
from luffy.model.router import RouterBase, RouterStats, Routing, wide


def call_in(dtype: torch.dtype, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with its floating parameters cast to `dtype`."""
    cast = {}
    for name, p in module.named_parameters():
        assert not is_sharded(p), f"{name} is sharded, and nobody gathered it"
        if p.is_floating_point() and p.dtype != dtype:
            cast[name] = p.to(dtype)
    return functional_call(module, cast, args, kwargs) if cast else module(*args, **kwargs)


def _call_adapted(dtype: torch.dtype, module: Any, *args: Tensor) -> Any:
    """As `call_in`, for a module of which PEFT may have adapted parameters: their sums are made here, in `dtype`.

    PEFT's wrapper would put its sum in the parameter's place for the call, as `functional_call` does with the cast, and
    the one undoes the other.
    """
    added: dict[str, Tensor] = {}
    while hasattr(module, "parameter_name"):
        name = module.parameter_name
        for adapter in () if module.disable_adapters or module.merged else module.active_adapters:
            if adapter in module.lora_A:
                a, b = (factor[adapter].weight.to(dtype) for factor in (module.lora_A, module.lora_B))
                added[name] = added.get(name, torch.zeros((), dtype=dtype)) + module.scaling[adapter] * (b @ a)
        module = module.base_layer
    if not added:
        return call_in(dtype, module, *args)
    own = {name: p.to(dtype) if p.is_floating_point() else p for name, p in module.named_parameters()}
    return functional_call(module, own | {name: own[name] + delta for name, delta in added.items()}, args)


class SharedExperts(nn.Module):
    """The library's shared experts, in their input's dtype; times the sigmoid of their gate, if they have one."""

    def __init__(self, module: nn.Module, gate: nn.Module | None, scale: float = 1.0) -> None:
        super().__init__()
        self.module, self.gate, self.scale = module, gate, scale

    def forward(self, x: Tensor) -> Tensor:
        y = call_in(x.dtype, self.module, x)
        y = y if self.scale == 1 else self.scale * y
        return y if self.gate is None else call_in(x.dtype, self.gate, x).sigmoid() * y


class LibraryRouter(RouterBase):
    """The library's gate: what it chooses and weighs, and what that says to the auxiliary losses.

    It computes in float32 at least, whatever the weights are kept in. bias_buffer: name of the bias for the choice, if
    there is one: the gate's own, or `bias`, which is then kept here and given to the gate. scale: of the weights.
    """

    gate: Any

    def __init__(
        self,
        gate: nn.Module,
        config: RouterConfig,
        bias_buffer: str | None,
        bias: Tensor | None = None,
        scale: float = 1.0,
    ) -> None:
        super().__init__()
        self.gate, self.config, self.bias_buffer, self.scale = gate, config, bias_buffer, scale
        if bias is not None:
            assert bias_buffer is not None
            self.register_buffer(bias_buffer, bias)
        self._apply(lambda t: t)  # buffers of a model in bfloat16 become float32

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = wide(torch.promote_types(x.dtype, next(self.gate.parameters()).dtype))
        with torch.autocast(x.device.type, enabled=False):
            bias = [b.to(dtype) for b in self._buffers.values() if b is not None]
            answer = _call_adapted(dtype, self.gate, x.to(dtype), *bias)
        logits, weights, ids = gate_answer(answer, self.config.top_k)
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        weights = weights.to(scores.dtype)
        return logits, scores, weights if self.scale == 1 else self.scale * weights, ids

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits, scores, _, ids = self._scores(x)
        return logits, scores, ids

    def forward(self, x: Tensor, layout: Layout, slot_of_expert: Tensor) -> tuple[Routing, RouterStats]:
        logits, scores, weights, ids = self._scores(x)
        self.note(ids)
        return Routing(ids, weights), RouterStats(logits, scores, ids, layout, self.config, slot_of_expert)

    def raise_bias(self, by: Tensor) -> None:
        assert self.bias_buffer is not None, "only families with a bias for the choice are given a rate"
        gate = self.gate
        while hasattr(gate, "base_layer"):  # within PEFT's wrapper, if it is adapted
            gate = gate.base_layer
        bias = getattr(self if self.bias_buffer in self._buffers else gate, self.bias_buffer)
        bias.add_(by.to(bias.dtype))


def gate_answer(answer: tuple[Tensor, ...], top_k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits [T, E], weights [T, K], ids [T, K] of what a gate says: these, or weights of all experts and logits.

    Granite's has them in reverse in transformers 5.20.
    """
    if len(answer) == 3:
        logits, weights, ids = answer if not answer[2].is_floating_point() else answer[::-1]
        return logits, weights, ids
    weights, logits = answer
    ids = logits.topk(top_k, dim=-1).indices
    return logits, weights.gather(1, ids), ids


def score_told(logits: Tensor, weights: Tensor, ids: Tensor) -> tuple[str, bool] | None:
    """How a gate makes weights [T, K] of logits [T, E]: "softmax" or "sigmoid", and whether the chosen are rescaled.

    None if neither explains them.
    """
    for score, p in (("softmax", logits.float().softmax(-1)), ("sigmoid", logits.float().sigmoid())):
        chosen = p.gather(1, ids)
        if torch.allclose(
            chosen / chosen.sum(1, keepdim=True), (weights / weights.sum(1, keepdim=True)).float(), atol=1e-4
        ):
            return score, not torch.allclose(chosen.sum(1), weights.sum(1).float(), atol=1e-4)
    return None
