"""Experts: many small feed-forward networks, run as one grouped matrix product.

A rank owns `num_local` experts, stored stacked. Rows arrive sorted by expert; on a GPU `F.grouped_mm` multiplies
each group by its own matrix without a host round trip, elsewhere one matrix product per expert does. An expert that
received no row still takes part and gets a zero gradient: a missing gradient would leave its optimizer state behind
that of its copies on other ranks.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luffy.config import ModelConfig
from luffy.model.layers import activate


class Experts(nn.Module):
    """[P, D] sorted by expert -> [P, D]: two grouped products around an activation.

    Where the parameters are and how they lie is the subclass's: it gives them as `_own` does, views allowed, with the
    experts first in every parameter.
    """

    num_local: int

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w_in [num_local, D, width], w_out [num_local, F, D], b_in [num_local, width], b_out [num_local, D]."""
        raise NotImplementedError

    def activate(self, x: Tensor) -> Tensor:
        """[P, width] -> [P, F]."""
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        return self._own()[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self._own()[0].device

    def forward(self, x: Tensor, num_tokens_per_expert: Tensor, guests: Tensor | None = None) -> Tensor:
        """x: [P, D] sorted by expert; num_tokens_per_expert: int64 [num_local + F].

        guests: [F, W] as `flat` gives them, experts of other ranks that take part behind this rank's own.
        """
        w_in, w_out, b_in, b_out = self._with(guests)
        hidden = self.activate(self._linear(x, w_in, b_in, num_tokens_per_expert))
        return self._linear(hidden, w_out, b_out, num_tokens_per_expert)

    def flat(self) -> Tensor:
        """All weights of each expert end to end: [num_local, W]."""
        return torch.cat([p.flatten(1) for p in self._own() if p is not None], dim=1)

    def _with(self, guests: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        own = self._own()
        if guests is None:
            return own
        parts = iter(guests.split([p[0].numel() for p in own if p is not None], dim=1))

        def joined(p: Tensor) -> Tensor:
            return torch.cat([p.to(guests.dtype), next(parts).unflatten(1, p.shape[1:])])

        w_in, w_out, b_in, b_out = (None if p is None else joined(p) for p in own)
        assert w_in is not None and w_out is not None
        return w_in, w_out, b_in, b_out

    def _linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, counts: Tensor) -> Tensor:
        y = grouped_linear(x, weight.to(x.dtype), counts)
        if bias is None:
            return y
        return y + torch.repeat_interleave(bias.to(x.dtype), counts, dim=0, output_size=x.shape[0])


class GroupedExperts(Experts):
    """The experts of a ModelConfig."""

    def __init__(self, config: ModelConfig, num_local: int) -> None:
        super().__init__()
        D, F_ = config.hidden_size, config.expert_hidden_size
        width = 2 * F_ if config.activation == "swiglu" else F_
        self.num_local, self.activation = num_local, config.activation
        self.w_in = nn.Parameter(torch.empty(num_local, D, width))
        self.w_out = nn.Parameter(torch.empty(num_local, F_, D))
        self.b_in = nn.Parameter(torch.empty(num_local, width)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(num_local, D)) if config.bias else None

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.w_in, self.w_out, self.b_in, self.b_out

    def activate(self, x: Tensor) -> Tensor:
        return activate(x, self.activation)


def grouped_linear(x: Tensor, weight: Tensor, counts: Tensor) -> Tensor:
    """x: [P, in] sorted by group, weight: [groups, in, out], counts: int64 [groups] -> [P, out]."""
    if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and x.shape[0] > 0:
        return F.grouped_mm(x, weight, offs=counts.cumsum(0).to(torch.int32))
    groups = x.split(counts.tolist())
    return torch.cat([g @ w for g, w in zip(groups, weight.unbind(0), strict=True)])
