"""Experts: many small feed-forward networks, run as one grouped matrix product.

A rank owns `num_local` experts, stored stacked. Rows arrive sorted by expert; on a GPU `F.grouped_mm` multiplies
each group by its own matrix without a host round trip, elsewhere one matrix product per expert does. An expert that
received no row still takes part and gets a zero gradient: a missing gradient would leave its optimizer state behind
that of its copies on other ranks.
"""

from __future__ import annotations

from functools import cached_property

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
        groups = Groups(num_tokens_per_expert, x.shape[0])
        hidden = self.activate(grouped_linear(x, w_in.to(x.dtype), groups, b_in))
        return grouped_linear(hidden, w_out.to(x.dtype), groups, b_out)

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


class Groups:
    """How `num_rows` rows, sorted by group, divide into groups of counts, int64 [n] on their device."""

    def __init__(self, counts: Tensor, num_rows: int) -> None:
        self.counts, self.num_rows = counts, num_rows

    @cached_property
    def ends(self) -> Tensor:
        """Where each group ends, int32 [n]."""
        return self.counts.cumsum(0, dtype=torch.int32)

    @cached_property
    def of_row(self) -> Tensor:
        """The group of each row, int64 [num_rows]."""
        groups = torch.arange(len(self.counts), device=self.counts.device)
        return groups.repeat_interleave(self.counts, output_size=self.num_rows)

    @cached_property
    def sizes(self) -> list[int]:
        """The counts on the host, which has to wait for them."""
        return [int(n) for n in self.counts.tolist()]

    def multiplies(self, x: Tensor) -> bool:
        """Whether one kernel multiplies all groups of x [num_rows, ..]."""
        return x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) and self.num_rows > 0


def grouped_linear(x: Tensor, weight: Tensor, groups: Groups, bias: Tensor | None = None) -> Tensor:
    """x [P, in], weight [n, in, out] of x's dtype, bias [n, out] of any -> [P, out], each group by its own."""
    if groups.multiplies(x):
        y = F.grouped_mm(x, weight, offs=groups.ends)
    else:
        parts = zip(x.split(groups.sizes), weight.unbind(0), strict=True)
        y = torch.cat([g @ w for g, w in parts])
    return y if bias is None else _AddBias.apply(y, bias, groups)


class _AddBias(torch.autograd.Function):
    """y [P, out] plus its group's row of bias [n, out].

    The bias's gradient, a sum over each group's rows, is a product with a row of ones: gathering rows of the bias
    would have its backward add thousands of rows into n, one atomic addition after the other, each rounded.
    """

    @staticmethod
    def forward(ctx, y: Tensor, bias: Tensor, groups: Groups) -> Tensor:
        ctx.groups, ctx.dtype = groups, bias.dtype
        return y + bias.to(y.dtype).index_select(0, groups.of_row)

    @staticmethod
    def backward(ctx, grad: Tensor):
        groups: Groups = ctx.groups
        if groups.multiplies(grad):
            ones = grad.new_ones(grad.shape[0], _ROWS_OF_ONES).t()  # so that they lie as the kernel asks
            summed = F.grouped_mm(ones, grad.contiguous(), offs=groups.ends)[:, 0]
        else:
            summed = torch.stack([g.sum(0) for g in grad.split(groups.sizes)])
        return grad, summed.to(ctx.dtype), None


_ROWS_OF_ONES = 16  # as many as the kernel wants at least; one would do
