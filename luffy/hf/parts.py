"""The library's stacked experts as this rank's share of them, with adapters; its norms as a MoELayer borrows them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luffy.errors import UserError
from luffy.hf.families import Family
from luffy.kernels.activation import Activation, activate
from luffy.kernels.grouped import add_bias, grouped_product, one_kernel
from luffy.kernels.rows import gather_rows, sum_rows
from luffy.kernels.sort import Pairs
from luffy.model.experts import Experts, weighted_bias
from luffy.model.library import call_in

if TYPE_CHECKING:
    from luffy.hf.adapters import ExpertAdapter


class LibraryExperts(Experts):
    """This rank's rows of the library's stacked experts, under the library's names and in its layout.

    gate_up_proj [n, 2F, D] and down_proj [n, D, F]; [n, D, 2F] and [n, F, D] where `transposed`; biases [n, ..].
    lora_A [n, r, in] and lora_B [n, out, r], by the name of the parameter that they adapt; scaling: in the order of
    PEFT's wrappers, the innermost first. Their product is added to that of the weight, which is left as it is. PEFT
    takes weights for [n, out, in] unless their module says `is_transposed`: Llama-4's does not, though they are not
    so, and its factors change places.
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
        self.weighs_input = family.weighs_input
        self.swapped = family.transposed and not getattr(stacked, "is_transposed", False)
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

    def factor_widths(self, name: str) -> tuple[int, int]:
        """Of a stacked parameter: last axis of lora_A, middle axis of lora_B."""
        width_in, width_out = self.widths(name)
        return (width_out, width_in) if self.swapped else (width_in, width_out)

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
        delta = self.scaling[name] * (self.lora_B[name] @ self.lora_A[name])
        return weight + (delta.transpose(1, 2) if self.transposed and not self.swapped else delta).to(weight.dtype)

    def _oriented(self, w_in: Tensor, w_out: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        if not self.transposed:
            w_in, w_out = w_in.transpose(1, 2), w_out.transpose(1, 2)
        return w_in, w_out, getattr(self, "gate_up_proj_bias", None), getattr(self, "down_proj_bias", None)

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self._oriented(self.merged("gate_up_proj"), self.merged("down_proj"))

    def forward(
        self, rows: Tensor, weights: Tensor, pairs: Pairs, guests: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        if not self.weighs_input and (guests is not None or not self.scaling):
            return super().forward(rows, weights, pairs, guests, residual)
        adapted = guests is None  # else adapters are within the weights
        weight = self._oriented(self.gate_up_proj, self.down_proj) if adapted else self._with(guests)
        w_in, w_out, b_in, b_out = weight
        x = gather_rows(rows, pairs.row, pairs.place)
        share = weights.reshape(-1).index_select(0, pairs.flat)[:, None]
        if self.weighs_input:
            x = (x * share).to(rows.dtype)
        hidden = grouped_product(x, self._cast("in", w_in, x.dtype), pairs)
        if adapted:
            hidden = self._adapted("gate_up_proj", hidden, x, pairs)
        hidden = activate(add_bias(hidden, b_in, pairs), self.activation)
        hidden = (hidden if self.weighs_input else hidden * share).to(x.dtype)
        answers = grouped_product(hidden, self._cast("out", w_out, x.dtype), pairs)
        if adapted:
            answers = self._adapted("down_proj", answers, hidden, pairs)
        bias = None if b_out is None else weighted_bias(b_out, weights, pairs, x.dtype)
        return sum_rows(answers, pairs.row, pairs.place, residual, bias)

    def _adapted(self, name: str, y: Tensor, x: Tensor, pairs: Pairs) -> Tensor:
        """y [P, out] and what the adapter makes of x [P, in]."""
        if name not in self.scaling:
            return y
        a, b = self.lora_A[name].to(x.dtype), self.lora_B[name].to(x.dtype)
        if self.swapped:
            a, b = b.transpose(1, 2), a.transpose(1, 2)
        if one_kernel(x) and (missing := -a.shape[1] % 8):  # the kernel wants rows of 16 bytes
            a, b = F.pad(a, (0, 0, 0, missing)), F.pad(b, (0, missing))
        low = grouped_product(x, a.transpose(1, 2), pairs)
        return y + self.scaling[name] * grouped_product(low, b.transpose(1, 2), pairs)


def lent(norm: nn.Module) -> Callable[[Tensor], Tensor]:
    """A layer's norm as a MoELayer borrows it."""
    return lambda rows: call_in(rows.dtype, norm, rows)
