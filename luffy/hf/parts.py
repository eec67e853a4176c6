"""The library's parts as a MoELayer wants them: its gate as a router, its stacked experts as this rank's share of them.

Weights may be kept in a wider dtype than the stream (float32 beside bfloat16): `call_in` then computes a library module
with its weights rounded to the stream's dtype, which is what the library does when it holds the model in that dtype,
while gradients arrive in the weights' own.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from luffy.comm.sharding import is_sharded
from luffy.config import RouterConfig
from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.hf.families import Family
from luffy.kernels.activation import Activation, activate
from luffy.kernels.grouped import add_bias, grouped_product, one_kernel
from luffy.kernels.rows import gather_rows, sum_rows
from luffy.kernels.sort import Pairs
from luffy.model.experts import Experts, weighted_bias
from luffy.model.router import RouterBase, RouterStats, Routing, wide

if TYPE_CHECKING:
    from luffy.hf.adapters import ExpertAdapter


def call_in(dtype: torch.dtype, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """`module(*args, **kwargs)` with its floating parameters cast to `dtype`."""
    cast = {}
    for name, p in module.named_parameters():
        assert not is_sharded(p), f"{name} is sharded, and nobody gathered it"
        if p.is_floating_point() and p.dtype != dtype:
            cast[name] = p.to(dtype)
    return functional_call(module, cast, args, kwargs) if cast else module(*args, **kwargs)


def _call_adapted(dtype: torch.dtype, module: Any, x: Tensor) -> Any:
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
        return call_in(dtype, module, x)
    own = {name: p.to(dtype) if p.is_floating_point() else p for name, p in module.named_parameters()}
    return functional_call(module, own | {name: own[name] + delta for name, delta in added.items()}, (x,))


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

    It computes in float32 at least, whatever the weights are kept in.
    """

    gate: Any

    def __init__(self, gate: nn.Module, config: RouterConfig, bias_buffer: str | None) -> None:
        super().__init__()
        self.gate, self.config, self.bias_buffer = gate, config, bias_buffer
        self._apply(lambda t: t)  # buffers of a model in bfloat16 become float32

    def _scores(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        dtype = wide(torch.promote_types(x.dtype, next(self.gate.parameters()).dtype))
        with torch.autocast(x.device.type, enabled=False):
            logits, weights, ids = _call_adapted(dtype, self.gate, x.to(dtype))
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        return logits, scores, weights.to(scores.dtype), ids

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
        bias = getattr(gate, self.bias_buffer)
        bias.add_(by.to(bias.dtype))


class LibraryExperts(Experts):
    """This rank's rows of the library's stacked experts, under the library's names and in its layout.

    gate_up_proj [n, 2F, D] and down_proj [n, D, F]; [n, D, 2F] and [n, F, D] where `transposed`; biases [n, ..].
    lora_A [n, r, in] and lora_B [n, out, r], by the name of the parameter that they adapt; scaling: in the order of
    PEFT's wrappers, the innermost first. Their product is added to that of the weight, which is left as it is.
    """

    gate_up_proj: Tensor
    down_proj: Tensor

    def __init__(
        self,
        stacked: nn.Module,
        family: Family,
        activate: Activation,
        num_local: int,
        first: int,
        adapters: Sequence[ExpertAdapter] = (),
    ) -> None:
        super().__init__()
        self.num_local, self.transposed, self.activation = num_local, family.transposed, activate
        names = ["gate_up_proj", "down_proj"]
        names += ["gate_up_proj_bias", "down_proj_bias"] if family.biases else []
        for name in names:
            whole = getattr(stacked, name)
            share = whole.detach()[first : first + num_local].clone()
            self.register_parameter(name, nn.Parameter(share, requires_grad=whole.requires_grad))
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.scaling: dict[str, float] = {}
        for adapter in adapters:
            own = slice(first, first + num_local)
            self.add_adapter(replace(adapter, a=adapter.a[own], b=adapter.b[own]), adapter.a.device)

    def add_adapter(self, adapter: ExpertAdapter, device: torch.device) -> None:
        """Adapt a parameter; factors of this rank's experts only."""
        if adapter.parameter not in ("gate_up_proj", "down_proj"):
            raise UserError(f"LoRA on experts.{adapter.parameter}: gate_up_proj and down_proj can be adapted")
        for store, factor in ((self.lora_A, adapter.a), (self.lora_B, adapter.b)):
            store[adapter.parameter] = nn.Parameter(
                factor.to(device).clone(memory_format=torch.contiguous_format), requires_grad=adapter.trained
            )
        self.scaling[adapter.parameter] = adapter.scaling

    def widths(self, name: str) -> tuple[int, int]:
        """Of a stacked parameter: what an expert takes in and gives out."""
        rows, columns = getattr(self, name).shape[1:]
        return (rows, columns) if self.transposed else (columns, rows)

    @property
    def hidden_size(self) -> int:
        return self.widths("gate_up_proj")[0]

    @property
    def device(self) -> torch.device:
        return self.down_proj.device

    def merged(self, name: str) -> Tensor:
        """A stacked parameter with its adapter, if any, added to it."""
        weight: Tensor = getattr(self, name)
        if name not in self.scaling:
            return weight
        delta = self.scaling[name] * (self.lora_B[name] @ self.lora_A[name])  # [n, out, in]
        return weight + (delta.transpose(1, 2) if self.transposed else delta).to(weight.dtype)

    def _oriented(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if not self.transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        return w_in, w_out, getattr(self, "gate_up_proj_bias", None), getattr(self, "down_proj_bias", None)

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self._oriented(self.merged("gate_up_proj"), self.merged("down_proj"))

    def forward(
        self, rows: Tensor, weights: Tensor, pairs: Pairs, guests: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if guests is not None or not self.scaling:
            return super().forward(rows, weights, pairs, guests, residual)
        w_in, w_out, b_in, b_out = self._oriented(self.gate_up_proj, self.down_proj)
        x = gather_rows(rows, pairs.row, pairs.place)
        hidden = grouped_product(x, self._cast("in", w_in, x.dtype), pairs)
        hidden = add_bias(self._adapted("gate_up_proj", hidden, x, pairs), b_in, pairs)
        share = weights.reshape(-1).index_select(0, pairs.flat)[:, None]
        hidden = (activate(hidden, self.activation) * share).to(x.dtype)
        answers = grouped_product(hidden, self._cast("out", w_out, x.dtype), pairs)
        answers = self._adapted("down_proj", answers, hidden, pairs)
        bias = None if b_out is None else weighted_bias(b_out, weights, pairs, x.dtype)
        return sum_rows(answers, pairs.row, pairs.place, residual, bias)

    def _adapted(self, name: str, y: Tensor, x: Tensor, pairs: Pairs) -> Tensor:
        """y [P, out] and what the adapter makes of x [P, in]."""
        if name not in self.scaling:
            return y
        a, b = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        if one_kernel(x) and (missing := -a.shape[1] % 8):  # the kernel wants rows of 16 bytes
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        low = grouped_product(x, a.transpose(1, 2), pairs)
        return y + self.scaling[name] * grouped_product(low, b.transpose(1, 2), pairs)


def lent(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer's norm as a MoELayer borrows it."""
    return lambda rows: call_in(rows.dtype, norm, rows)
