"""Weights of which every rank keeps a part, gathered while they are used: PyTorch's `fully_shard` (FSDP2).

A replicated weight costs every rank its values, their gradients and two moments. A sharded one is a DTensor, which
optimizers and checkpoints know how to treat. Products need it whole, so `fully_shard` gathers around the `forward` of a
module. Ours are not called that way: a decoder layer is a loop of stages in which two micro-batches take turns, and its
shared experts are called as often as rows need it, which differs between ranks, while collectives must not. So a `Unit`
holds the modules whose weights come and go together, and the stream passes through it where their use begins and ends:

    forward     | enter: gather | attention, experts, ..   | leave: let go |
    backward    | leave: gather | .. experts, attention    | enter: sum gradients, each rank its part; let go |

`enter` is the unit's `forward`, an identity, so that what happens there in both passes is FSDP's own doing; the rest is
`unshard` and `reshard`. Autograd executes nodes in the reverse of the order in which they were made, so all others of
the layer lie between these two, on every rank; a unit stays whole while either micro-batch is in it.

Gradients are summed, not averaged: our losses are divided by the labels of all ranks. What is sent is metered as
`gradients`.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

from luffy.comm.collectives import Comm, all_gather_flat, reduce_scatter_flat
from luffy.errors import UserError


def is_sharded(parameter: Tensor) -> bool:
    return isinstance(parameter, DTensor)


def is_split_apart(parameter: Tensor, comm: Comm) -> bool:
    """Whether a parameter is split over ranks of which this mesh has one alone, as by tensor parallelism: then every
    rank of the mesh has the same part, and gradients of it are summed as those of any replicated weight.

    Raises UserError where it is split over some of the mesh's ranks only, whose gradients nobody could sum.
    """
    if not isinstance(parameter, DTensor):
        return False
    there = set(parameter.device_mesh.mesh.flatten().tolist())
    here = set(comm.mesh.world_mesh.mesh.flatten().tolist())
    if here == there or (len(here) > 1 and here <= there):  # a mesh of one rank lies in any
        return False
    if len(here & there) > 1:
        raise UserError(
            f"a weight {list(parameter.shape)} is split over {sorted(there)}, some of the {len(here)} ranks of "
            "luffy's mesh; let your own wrapper sum the gradients (docs/own_model.md)"
        )
    return True


def local_part(tensor: Tensor) -> Tensor:
    """What this rank has of a tensor, sharded or not; shares its memory."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def whole(tensor: Tensor) -> Tensor:
    """A tensor in full, sharded or not; every rank calls it.

    Not by `full_tensor`: over gloo its collective takes a GPU's memory for the host's, and crashes (torch 2.11).
    """
    if not isinstance(tensor, DTensor):
        return tensor.detach()
    group, part = tensor.device_mesh.get_group(), tensor.to_local()
    share = _rows_per_rank(tensor.shape[0], group.size())
    mine = part.new_zeros(share, *tensor.shape[1:])
    mine[: part.shape[0]] = part
    every = part.new_empty(group.size() * share, *tensor.shape[1:])
    all_gather_flat(every, mine, group=group)
    return every[: tensor.shape[0]]


class Unit(nn.Module):
    """Modules whose weights are gathered together, once `shard_units` has cut them. Not in the model's tree of modules.

    ahead: whether the backward pass may gather them before it comes to `leave`.
    """

    def __init__(self, modules: list[nn.Module], ahead: bool = True) -> None:
        super().__init__()
        self.parts, self.ahead = nn.ModuleList(modules), ahead
        self._inside = 0  # uses that have begun and not ended, in the pass that is under way

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden

    def enter(self, hidden: Tensor) -> Tensor:
        """From here on the weights are whole. Every rank enters each unit equally often."""
        hidden = _OnTheWayBack.apply(hidden, None, self)
        self._inside += 1
        return self(hidden)

    def leave(self, hidden: Tensor, start: Tensor | None = None, keep: bool = False, again: bool = True) -> Tensor:
        """The end of what `enter` began.

        start: what `enter` gave, where `hidden` was not computed from it. keep: stay whole for the backward pass, which
        comes next. again: whether that pass needs the weights.
        """
        self._inside -= 1
        if not keep:
            self._let_go()
        return _OnTheWayBack.apply(hidden, start, self, again)

    def back_in(self, gather: bool) -> None:
        self._inside += 1
        if gather:
            cast(FSDPModule, self).unshard()

    def back_out(self) -> None:
        self._inside -= 1
        self._let_go()

    def _let_go(self) -> None:
        if self._inside == 0:
            cast(FSDPModule, self).reshard()


class _OnTheWayBack(torch.autograd.Function):
    """Identity on the stream that tells a unit when the backward pass comes by: out of it, or (again given) into it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, start: Tensor | None, unit: Unit, again: bool | None = None) -> Tensor:
        ctx.unit, ctx.again, ctx.started = unit, again, start is not None
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        if ctx.again is None:
            ctx.unit.back_out()
        else:
            ctx.unit.back_in(ctx.again)
        return grads[0], grads[0].new_zeros(()) if ctx.started else None, None, None


class Units(nn.Module):
    """All units of a model under one root, so that the backward pass gathers the next one ahead."""

    def __init__(self, units: list[Unit]) -> None:
        super().__init__()
        self.units = nn.ModuleList(units)

    def forward(self, nothing: Tensor) -> Tensor:
        return nothing

    @torch.no_grad()
    def begin(self) -> None:
        """Before each forward pass of the model: FSDP takes whoever is called first for the root."""
        self(torch.zeros(()))


def shard_units(comm: Comm, units: list[Unit], dtype: torch.dtype, keep_whole: Iterable[nn.Parameter] = ()) -> Units:
    """Cut the parameters of units over the world, in place, but for `keep_whole`. dtype: that they are gathered in."""
    world, ignored = comm.mesh.world_mesh, set(keep_whole)
    root = Units(units)
    # An identity gives a view. That is dangerous where somebody changes it in place, and nobody does.
    warnings.filterwarnings("ignore", r"FSDP2-wrapped module \(FSDPUnit\) returned a view")
    for unit in units:
        weights = {p.dtype for p in unit.parameters() if p not in ignored}
        wide = weights.pop() if len(weights) == 1 else None  # summed in the weights' own type, as replicated ones are
        policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=wide, cast_forward_inputs=False)
        # Not after its forward, which is an identity, and not where one of two micro-batches has left it.
        fully_shard(unit, mesh=world, reshard_after_forward=False, mp_policy=policy, ignored_params=ignored)
        sharded = cast(FSDPModule, unit)
        sharded.set_reshard_after_backward(False)
        sharded.set_unshard_in_backward(unit.ahead)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)
        sharded.set_custom_all_gather(cast(Any, _AllGather(comm)))
        sharded.set_custom_reduce_scatter(cast(Any, _ReduceScatter(comm)))
    fully_shard(root, mesh=world, reshard_after_forward=False, ignored_params=ignored)
    return root


def _rows_per_rank(rows: int, world_size: int) -> int:
    """As torch's `Shard(0)` divides: so many for each rank but the last ones, which may have fewer or none."""
    return -(-rows // world_size)


def rows_of(parameter: Tensor, comm: Comm) -> tuple[int, int]:
    """Which rows of a sharded parameter this rank has, from and up to."""
    rows, rank = parameter.shape[0], comm.mesh.rank
    share = _rows_per_rank(rows, comm.mesh.world_size)
    return min(rank * share, rows), min((rank + 1) * share, rows)


class _Collective:
    """What FSDP asks of a collective of the user's: memory for its results, and the call."""

    def __init__(self, comm: Comm) -> None:
        self.comm = comm

    def allocate(self, size: Any, *, dtype: torch.dtype, device: torch.device) -> Tensor:
        return torch.empty(*size, dtype=dtype, device=device)


class _AllGather(_Collective):
    def __call__(
        self, output_tensor: Tensor, input_tensor: Tensor, group: dist.ProcessGroup, async_op: bool = False
    ) -> dist.Work | None:
        self.comm.meter.all_gather("gradients", range(group.size()), input_tensor.nbytes)
        return all_gather_flat(output_tensor, input_tensor, group=group, async_op=async_op)


class _ReduceScatter(_Collective):
    def __call__(
        self,
        output_tensor: Tensor,
        input_tensor: Tensor,
        group: dist.ProcessGroup,
        op: Any = dist.ReduceOp.SUM,
        async_op: bool = False,
    ) -> dist.Work | None:
        """input_tensor: [n * m], output_tensor: [m]."""
        assert op == dist.ReduceOp.SUM, op
        self.comm.meter.all_gather("gradients", range(group.size()), output_tensor.nbytes)
        if dist.get_backend(group) != "gloo":
            return reduce_scatter_flat(output_tensor, input_tensor, op=op, group=group, async_op=async_op)
        # gloo's own is an all-reduce of the whole, twice the bytes: send every rank its part, and add up.
        received = torch.empty_like(input_tensor)
        dist.all_to_all_single(received, input_tensor, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output_tensor)
        return None
