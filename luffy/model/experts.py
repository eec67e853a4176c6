"""Experts: many small feed-forward networks, run as one grouped matrix product.

A rank owns `num_local` experts, stacked. Each row serves some of them, a (row, expert) pair each; `pairs` has them
sorted by expert. All between a rank's rows and the sums of its experts' answers is one function:

    pairs -> rows by expert -> first product -> activation times the choice's weight -> second product -> sum by row

It keeps its rows and what the first product gave, nothing else that is as long as there are pairs: rows are gathered,
and activations computed, again in the backward pass. An expert that received no row still takes part and gets a zero
gradient: a missing gradient would leave its optimizer state behind that of its copies on other ranks.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from luffy.config import ModelConfig
from luffy.kernels.activation import Activation, activate_weighted, activate_weighted_backward
from luffy.kernels.grouped import group_sums, grouped_outer, grouped_product
from luffy.kernels.rows import add_up, pick
from luffy.kernels.sort import Pairs
from luffy.model.casting import CastOnce


class Experts(nn.Module):
    """Rows [R, D] -> [R, D], for each row the weighted sum of what its experts say.

    Where the parameters are and how they lie is the subclass's: it gives them as `_own` does, views allowed, with the
    experts first in every parameter. activation: see luffy.kernels.activation.
    """

    num_local: int
    activation: Activation

    def __init__(self) -> None:
        super().__init__()
        self._cast = CastOnce()

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w_in [num_local, D, width], w_out [num_local, F, D], b_in [num_local, width], b_out [num_local, D]."""
        raise NotImplementedError

    @property
    def hidden_size(self) -> int:
        return self._own()[0].shape[1]

    @property
    def device(self) -> torch.device:
        return self._own()[0].device

    def forward(
        self, rows: Tensor, weights: Tensor, pairs: Pairs, guests: Tensor | None = None, residual: Tensor | None = None
    ) -> Tensor:
        """rows [R, D], weights [R, K] of choices, pairs of choices by expert -> [R, D], added in float32 at least.

        guests: [F, W] as `flat` gives them, experts of other ranks that take part behind this rank's own.
        residual: [R, D] to add within the same sums, which then are rounded once.
        """
        w_in, w_out, b_in, b_out = self._with(guests)
        w_in, w_out = self._cast("in", w_in, rows.dtype), self._cast("out", w_out, rows.dtype)
        biases = None if b_out is None else weighted_bias(b_out, weights, pairs, rows.dtype)
        return _WeightedExperts.apply(rows, weights, w_in, w_out, b_in, residual, biases, pairs, self.activation)

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
        D, F_ = config.row_size, config.expert_hidden_size
        width = 2 * F_ if config.activation == "swiglu" else F_
        self.num_local, self.activation = num_local, config.activation
        self.w_in = nn.Parameter(torch.empty(num_local, D, width))
        self.w_out = nn.Parameter(torch.empty(num_local, F_, D))
        self.b_in = nn.Parameter(torch.empty(num_local, width)) if config.bias else None
        self.b_out = nn.Parameter(torch.empty(num_local, D)) if config.bias else None

    @classmethod
    def holding(
        cls, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None, activation: Activation, train: bool
    ) -> GroupedExperts:
        """Of weights that exist, in the shapes of `_own`. train: whether they ask for a gradient."""
        experts = cls.__new__(cls)
        Experts.__init__(experts)
        experts.num_local, experts.activation = len(w_in), activation
        for name, value in {"w_in": w_in, "w_out": w_out, "b_in": b_in, "b_out": b_out}.items():
            parameter = None if value is None else nn.Parameter(value, requires_grad=train)
            experts.register_parameter(name, parameter)
        return experts

    def _own(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        return self.w_in, self.w_out, self.b_in, self.b_out


def weighted_bias(bias: Tensor, weights: Tensor, pairs: Pairs, dtype: torch.dtype) -> Tensor:
    """sum_k weights[r, k] * bias[expert of that choice]: [R, D], one small product instead of a row a pair."""
    n, (R, _) = bias.shape[0], weights.shape
    served = pairs.place >= 0
    expert = torch.where(served, _look_up(pairs.group, pairs.place), n)  # [R, K]
    share = weights.new_zeros(R, n + 1).scatter_add(1, expert, weights)[:, :n]
    return share.to(dtype) @ bias.to(dtype)


def _look_up(table: Tensor, index: Tensor) -> Tensor:
    """table [P] at index [R, K], anything where that is negative: int64."""
    if not table.numel():
        return torch.zeros_like(index, dtype=torch.int64)
    return table.index_select(0, index.clamp_min(0).flatten()).view(index.shape).long()


class _WeightedExperts(torch.autograd.Function):
    """The whole of `Experts.forward`; what it keeps is said above."""

    @staticmethod
    def forward(
        ctx,
        rows: Tensor,
        weights: Tensor,
        w_in: Tensor,
        w_out: Tensor,
        b_in: Tensor | None,
        residual: Tensor | None,
        biases: Tensor | None,
        pairs: Pairs,
        activation: Activation,
    ) -> Tensor:
        hidden = grouped_product(pick(rows, pairs.row), w_in, pairs)
        answers = grouped_product(activate_weighted(hidden, b_in, weights, pairs, activation), w_out, pairs)
        ctx.save_for_backward(rows, weights, w_in, w_out, b_in, hidden)
        ctx.pairs, ctx.activation = pairs, activation
        return add_up(answers, pairs.row, pairs.place, residual, biases)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        rows, weights, w_in, w_out, b_in, hidden = ctx.saved_tensors
        pairs: Pairs = ctx.pairs
        wants_rows, _, wants_in, wants_out, wants_bias = ctx.needs_input_grad[:5]
        to_in = to_out = to_bias = to_rows = None
        upstream = pick(grad, pairs.row)
        to_hidden, activated, to_weights = activate_weighted_backward(
            grouped_product(upstream, w_out.transpose(1, 2), pairs), hidden, b_in, weights, pairs, ctx.activation
        )
        if wants_out:
            to_out = grouped_outer(activated, upstream, pairs, like=w_out)
        del upstream, activated
        if wants_bias:
            to_bias = group_sums(to_hidden, pairs).to(b_in.dtype)
        if wants_in:
            to_in = grouped_outer(pick(rows, pairs.row), to_hidden, pairs, like=w_in)
        if wants_rows:
            to_rows = add_up(grouped_product(to_hidden, w_in.transpose(1, 2), pairs), pairs.row, pairs.place)
        return to_rows, to_weights, to_in, to_out, to_bias, *(g if w else None for g, w in zip(
            (grad, grad), ctx.needs_input_grad[5:7], strict=True)), None, None  # fmt: skip
