"""A bad step is never saved: what is not finite stops the run, or is left out, and the message says where it began.

A loss or a gradient that is not finite is found before the update, on numbers that all ranks share; weights and
optimizer state are looked at before they are saved. The place is found afterwards, so that it costs a good step
nothing: first by weight, then by one more forward pass with an eye on every module.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from luffy.comm import Mesh
from luffy.comm.sharding import local_part
from luffy.errors import UserError
from luffy.train.ranklog import say

MEND = "lower --lr or set --clip-norm, and continue from the last checkpoint with --resume"


def finite(tensor: Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(local_part(tensor)).all())


def all_finite(tensors: Iterable[Tensor]) -> bool:
    """One answer from the device for all of them."""
    flags = [torch.isfinite(local_part(t)).all() for t in tensors if t.is_floating_point()]
    by_device: dict[torch.device, list[Tensor]] = {}
    for flag in flags:
        by_device.setdefault(flag.device, []).append(flag)
    return all(bool(torch.stack(some).all()) for some in by_device.values())


def _earliest(found: tuple[int, str] | None, mesh: Mesh) -> str | None:
    """The name with the lowest place of all ranks."""
    every: list[tuple[int, str] | None] = [None] * mesh.world_size
    dist.all_gather_object(every, found)
    return min((f for f in every if f is not None), default=(0, None))[1]


def bad_weight(model: nn.Module, mesh: Mesh) -> str | None:
    """The first weight or buffer, in the model's order, that is not finite on some rank."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return _earliest(next(((i, n) for i, (n, t) in enumerate(tensors) if not finite(t)), None), mesh)


def _tensors_of(value: Any) -> Iterable[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _tensors_of(item)


@torch.no_grad()
def bad_module(model: nn.Module, forward: Callable[[], None], mesh: Mesh) -> str | None:
    """The first module to give out something that is not finite in `forward`, which all ranks call."""
    calls, first = 0, None

    def look(name: str) -> Callable[..., None]:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            nonlocal calls, first
            calls += 1
            if first is None and not all(finite(t) for t in _tensors_of(output)):
                first = (calls, name)

        return hook

    handles = [m.register_forward_hook(look(name)) for name, m in model.named_modules() if name]
    try:
        forward()
    finally:
        for handle in handles:
            handle.remove()
    return _earliest(first, mesh)


class StepGuard:
    """limit: steps that may be left out. skipped: steps that were, kept in checkpoints."""

    def __init__(self, model: nn.Module, mesh: Mesh, limit: int) -> None:
        self.model, self.mesh, self.limit, self.skipped = model, mesh, limit, 0

    def passes(self, step: int, loss: float, grad_norm: float, forward: Callable[[], None]) -> bool:
        """Whether to make the update of `step`; False: leave it out.

        loss, grad_norm: the same on all ranks. forward: the step's forward pass again. Raises UserError, on every rank,
        where the step is bad and may not be left out, naming where it began.
        """
        if math.isfinite(loss) and math.isfinite(grad_norm):
            return True
        weight = bad_weight(self.model, self.mesh)
        what = f"step {step}: loss {loss}, gradient norm {grad_norm}"
        if weight is None and self.skipped < self.limit:
            self.skipped += 1
            if self.mesh.rank == 0:
                say(f"{what}: left out ({self.skipped} of {self.limit})")
            return False
        if weight is not None:
            where = f"the weight {weight} is not finite"
        elif module := bad_module(self.model, forward, self.mesh):
            where = f"first seen in the output of {module}"
        else:
            where = "every output of the forward pass is finite, so it began in the backward pass"
        limit = f" {self.skipped} steps had been left out (--skip-bad-steps)." if self.limit else ""
        raise UserError(f"{what}, not finite; {where}. No update was made.{limit} To mend it: {MEND}")

    def check_state(self, step: int, optimizer: torch.optim.Optimizer, measure: Callable[[], float]) -> None:
        """Before a checkpoint, and at the end. Raises UserError, on every rank, where what is saved is not finite.

        measure: the loss of a held-out micro-batch, the same on all ranks: weights may be finite and of no use.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        for state in optimizer.state.values():
            tensors += [t for t in state.values() if isinstance(t, Tensor)]
        flag = torch.tensor(float(all_finite(tensors)), device=self.mesh.device)
        dist.all_reduce(flag, op=dist.ReduceOp.MIN, group=self.mesh.world_group)
        if not flag:
            weight = bad_weight(self.model, self.mesh)
            where = f"the weight {weight} is not finite" if weight else "a moment of the optimizer is not finite"
        elif not math.isfinite(loss := measure()):
            where = f"the held-out loss is {loss}, not finite,"
        else:
            return
        raise UserError(f"step {step}: {where} after the update. Nothing was saved; to mend it: {MEND}")
