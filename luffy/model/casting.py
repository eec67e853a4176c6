"""Weights in the dtype of computation, cast once a step: not once a micro-batch, and again where layers are recomputed.

A cast of a parameter, or of a view of one, is kept until the weight changes: every in-place operation counts up a
tensor's version. Fused optimizers change weights without counting, so a step of any `torch.optim.Optimizer` ends what
was kept before it. An optimizer of another make could write to `p.data`, which counts nowhere; so in a loop that is not
our trainer's a backward pass ends it as well, and `keep_over_micro_batches` is the trainer's word that its optimizer is
one of torch's.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.optim.optimizer import register_optimizer_step_post_hook

_steps = 0
_keeps_over_backward = False


def keep_over_micro_batches(yes: bool = True) -> None:
    """Keep casts until the optimizer steps, one of `torch.optim`; without, until the next backward pass."""
    global _keeps_over_backward
    _keeps_over_backward = yes


def _count_step(*_: object) -> None:
    global _steps
    _steps += 1


register_optimizer_step_post_hook(_count_step)


class _State(NamedTuple):
    """What a kept cast is good for: memory, its version, optimizer steps so far, dtype."""

    pointer: int
    version: int
    steps: int
    dtype: torch.dtype


class CastOnce:
    """Casts of one module's weights, by name. Their gradients arrive in the weights' own dtype."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[_State, Tensor]] = {}

    def __call__(self, name: str, weight: Tensor, dtype: torch.dtype) -> Tensor:
        if weight.dtype == dtype:
            return weight
        if not isinstance(weight if weight._base is None else weight._base, nn.Parameter):
            return weight.to(dtype)  # made for this call: its memory may come back with other values
        state = _State(weight.data_ptr(), weight._version, _steps, dtype)
        kept = self._kept.get(name)
        if kept is None or kept[0] != state:
            self._kept.pop(name, None)  # its memory first
            kept = state, weight.detach().to(dtype)
            self._kept[name] = kept
        return _Cast.apply(weight, kept[1])

    def __deepcopy__(self, memo: dict) -> CastOnce:
        return CastOnce()

    def __reduce__(self) -> tuple[type, tuple]:
        return CastOnce, ()


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx, weight: Tensor, cast: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return cast.view_as(cast)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        if not _keeps_over_backward:
            _count_step()
        return grad.to(ctx.dtype), None
