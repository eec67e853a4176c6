"""Dense weights divided over all ranks: each layer's are whole only while that layer is computed.

`shard_dense` cuts the matrices of attention, dense and shared feed-forwards, embedding and head over the world
(luffy.model.sharding). Norms, gates and biases, less than a hundredth of a model, stay replicated, and so does whatever
is called a number of times that depends on where rows went: collectives are unconditional.

    forward     | gather layer | attention, experts, ..    | let go |
    backward    | gather layer | .. experts, attention     | let go | sum gradients, each rank its rows |

The graph of the forward pass does not keep the whole weights: where an operation would save one, it saves a note of
which (`Held.notes`), and finds what was gathered again when the backward pass entered the layer. It enters by the
layer's last node and leaves by its first. Autograd executes nodes in the reverse of the order in which they were made,
so between these two lie all others of the layer, on every rank, also where two micro-batches take turns: then the
weights are whole while either of them is in the layer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from luffy.comm import Comm
from luffy.model.moe_layer import MoELayer
from luffy.model.sharding import gather, is_sharded, shard_of


class Held:
    """The whole weights of some modules: gathered at the first `enter`, let go at the last `leave`."""

    def __init__(self, comm: Comm, modules: list[nn.Module], dtype: torch.dtype) -> None:
        self.comm, self.dtype = comm, dtype
        self.shards = list({id(p): p for m in modules for p in m.parameters() if is_sharded(p)}.values())
        self._users, self._whole = 0, dict[int, Tensor]()
        self._storages: dict[int, int] = {}  # address -> which, of what this forward pass gathered

    @property
    def released(self) -> bool:
        return self._users == 0

    def enter(self, again: bool = False) -> None:
        """again: in the backward pass, which has the graph of the first gathering."""
        self._users += 1
        if self._users > 1:
            return
        with torch.no_grad() if again else contextlib.nullcontext():
            whole = gather(self.comm, self.shards, self.dtype)
        if again:
            # Recomputation under checkpointing must save what it saved the first time.
            whole = [w.requires_grad_(p.requires_grad) for w, p in zip(whole, self.shards, strict=True)]
        else:
            self._storages = {w.untyped_storage().data_ptr(): i for i, w in enumerate(whole)}
        self._whole = {id(p): w for p, w in zip(self.shards, whole, strict=True)}

    def leave(self) -> None:
        self._users -= 1
        if self._users == 0:
            self._whole, self._storages = {}, {}

    def of(self, shard: Tensor) -> Tensor:
        return self._whole[id(shard)]

    def notes(self) -> contextlib.AbstractContextManager[Any]:
        """Within, the graph saves notes in the place of these weights."""

        def pack(saved: Tensor) -> Any:
            which = self._storages.get(saved.untyped_storage().data_ptr())
            if which is None:
                return saved
            return which, saved.shape, saved.stride(), saved.storage_offset()

        def unpack(packed: Any) -> Tensor:
            if isinstance(packed, Tensor):
                return packed
            which, shape, stride, offset = packed
            return self._whole[id(self.shards[which])].detach().as_strided(shape, stride, offset)

        return torch.autograd.graph.saved_tensors_hooks(pack, unpack)


def noted(held: Held | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if held is None else held.notes()


class _OnTheWayBack(torch.autograd.Function):
    """Identity on the stream, whose backward pass does something when it comes by."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, action: Callable[[], None]) -> Tensor:
        ctx.action = action
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        ctx.action()
        return grads[0], None


def enter_layer(hidden: Tensor, held: Held) -> Tensor:
    """The layer's first node: the backward pass leaves the layer there."""
    hidden = _OnTheWayBack.apply(hidden, held.leave)
    held.enter()
    return hidden


def leave_layer(hidden: Tensor, held: Held) -> Tensor:
    """The layer's last node: the backward pass enters the layer there."""
    held.leave()
    return _OnTheWayBack.apply(hidden, partial(held.enter, again=True))


def modules_of(layer: nn.Module, block: nn.Module) -> list[nn.Module]:
    """Those of a decoder layer whose matrices are sharded. block: its feed-forward."""
    attention: Any = layer.self_attn
    if not isinstance(block, MoELayer):
        return [attention, block]
    return [attention] if block.shared_experts is None else [attention, block.shared_experts.module]  # type: ignore[list-item]


def shard_dense(comm: Comm, modules: list[nn.Module]) -> None:
    """Cut the matrices of `modules` over the world, in place; what is tied stays so. Adapters stay whole."""
    made: dict[int, nn.Parameter] = {}
    for part in modules:
        for name, module in part.named_modules():
            for leaf, p in module._parameters.items():
                if p is None or p.dim() < 2 or is_sharded(p) or "lora_" in f"{name}.{leaf}":
                    continue
                if id(p) not in made:
                    made[id(p)] = shard_of(p, comm.mesh)
                module._parameters[leaf] = made[id(p)]


@contextlib.contextmanager
def whole_again(comm: Comm, model: nn.Module) -> Iterator[None]:
    """Within, sharded parameters are whole ones, on every rank; without gradient. Every rank enters and leaves."""
    places = [
        (m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if p is not None and is_sharded(p)
    ]
    made: dict[int, nn.Parameter] = {}
    for module, leaf, p in places:
        if id(p) not in made:
            made[id(p)] = nn.Parameter(whole(comm, p), requires_grad=False)
        module._parameters[leaf] = made[id(p)]
    try:
        yield
    finally:
        for module, leaf, p in places:
            module._parameters[leaf] = p


@torch.no_grad()
def whole(comm: Comm, parameter: Tensor) -> Tensor:
    """A parameter in full, sharded or not; every rank calls it."""
    return gather(comm, [parameter])[0] if is_sharded(parameter) else parameter.detach()
