"""Dense weights divided over all ranks: which modules of a decoder make up which unit (luffy.comm.sharding).

Attention with dense or shared feed-forward is one unit a layer, embedding and head one each, or one together where
they are tied. Layer norms and gates, less than a hundredth of a model, stay replicated, and so do adapters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from luffy.comm import Comm
from luffy.comm.sharding import Unit, is_sharded, shard_units, whole
from luffy.hf.attention import mixer_of
from luffy.model.moe_layer import MoELayer


class DenseUnits:
    """The units of a causal LM whose dense weights are sharded, and how its forward pass goes through them."""

    def __init__(self, comm: Comm, lm: Any, blocks: list[nn.Module], dtype: torch.dtype) -> None:
        """blocks: the feed-forward of each layer. dtype: that the weights are gathered in."""
        embedding, head = lm.get_input_embeddings(), lm.get_output_embeddings()
        tied = embedding.weight is head.weight
        self.layers = [Unit(_modules_of(layer, b)) for layer, b in zip(lm.model.layers, blocks, strict=True)]
        # No product of the backward pass wants the embedding whole; a tied head asks for it by itself.
        self.head = Unit([embedding, head], ahead=False) if tied else Unit([head])
        self.embedding = self.head if tied else Unit([embedding], ahead=False)
        units = [*([] if tied else [self.embedding]), *self.layers, self.head]
        adapted: list[Any] = [m for unit in self.layers for m in unit.modules() if hasattr(m, "base_layer")]
        own = {p for m in adapted for p in m.base_layer.parameters()}
        adapters = [p for m in adapted for p in m.parameters() if p not in own]
        self._root = shard_units(comm, units, dtype, keep_whole=adapters)

    def begin(self) -> None:
        self._root.begin()

    def embed(self, embedding: nn.Module, tokens: Tensor) -> Tensor:
        """tokens [T] -> [T, D]."""
        start = torch.zeros((), device=tokens.device, requires_grad=torch.is_grad_enabled())
        start = self.embedding.enter(start)
        return self.embedding.leave(embedding(tokens), start, again=False)


def _modules_of(layer: Any, block: nn.Module) -> list[nn.Module]:
    """Those of a decoder layer whose weights are sharded. block: its feed-forward."""
    attention = mixer_of(layer)
    if not isinstance(block, MoELayer):
        return [attention, block]
    shared: Any = block.shared_experts
    return [attention] if shared is None else [attention, shared.module]


@contextlib.contextmanager
def whole_again(model: nn.Module) -> Iterator[None]:
    """Within, sharded parameters are whole ones, on every rank; without gradient. Every rank enters and leaves."""
    places = [
        (m, leaf, p) for m in model.modules() for leaf, p in m._parameters.items() if p is not None and is_sharded(p)
    ]
    made: dict[int, nn.Parameter] = {}
    for module, leaf, p in places:
        if id(p) not in made:
            made[id(p)] = nn.Parameter(whole(p), requires_grad=False)
        module._parameters[leaf] = made[id(p)]
    try:
        yield
    finally:
        for module, leaf, p in places:
            module._parameters[leaf] = p
