"""The stack: the loop over blocks and the loss, once for our transformer and for other libraries' layers.

A model supplies its embedding, its blocks and its head; see `Stack`. The loss is a *sum* over this rank's tokens
divided by the number of labels of the whole step on all ranks, so that gradients summed over ranks and micro-batches
are those of the global mean, however unevenly the tokens are spread.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luffy.comm.clock import boundary
from luffy.compose import Runtime
from luffy.config import ModelConfig
from luffy.data.batch import Layout, TokenBatch
from luffy.exchange.dispatcher import Forecast
from luffy.exchange.migrate import transfer
from luffy.exchange.stage import Stage, alternate, finish
from luffy.model.aux_loss import AuxLoss, auxiliary_loss
from luffy.model.moe_layer import MoELayer, Predictor
from luffy.model.router import RouterStats

IGNORE_INDEX = -100
# Rows of logits held at once: 8192 x 50k x 4 bytes is 1.6 GB; the rest is recomputed in the backward pass.
LOSS_CHUNK = 8192


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass on one rank.

    tokens, labels: int64 [T], sequences end to end as `layout` says; labels are IGNORE_INDEX where there is none.
    num_tokens: tokens of this micro-batch on all ranks. step_tokens, step_labels: tokens and labels of the whole
    optimizer step on all ranks, which is more where gradients are accumulated.
    memory: see TokenBatch. seat_strength: factor of the seat loss in this step.
    """

    tokens: Tensor
    labels: Tensor
    layout: Layout
    num_tokens: int
    step_tokens: int
    step_labels: int
    padded: bool = False
    memory: tuple[Tensor, ...] | None = None
    seat_strength: float = 1.0


@dataclass(frozen=True)
class ModelOutput:
    """`loss`: what to call backward on; its sum over ranks and micro-batches is the loss of the step.

    `token_loss`: this rank's share of the cross-entropy, [] without gradient. `aux`: see AuxLoss, None without
    MoE layers. `memory`: states for the next segment.
    """

    loss: Tensor
    token_loss: Tensor
    aux: AuxLoss | None
    memory: tuple[Tensor, ...]


class StackBlock(Protocol):
    """One block: TokenBatch -> TokenBatch, yielding where it waits for rows. moe: its MoE layer, if it has one."""

    @property
    def moe(self) -> MoELayer | None: ...

    def predict(self, hidden: Tensor) -> Forecast:
        """What this block's router would choose for the stream of an earlier one."""
        ...

    def stages(self, batch: TokenBatch, predict_next: Predictor | None = None) -> Stage[TokenBatch]: ...


class Stack(nn.Module):
    """MicroBatch -> ModelOutput. `stream_dtype`: of the residual stream and of all matrix products."""

    config: ModelConfig
    runtime: Runtime
    stream_dtype: torch.dtype

    def embed(self, micro: MicroBatch) -> Tensor:
        """The stream before the first block, [T, D]."""
        raise NotImplementedError

    def stack(self, micro: MicroBatch, hidden: Tensor) -> Sequence[StackBlock]:
        """The blocks, for this forward pass."""
        raise NotImplementedError

    def sum_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of [T, D] against [T]."""
        raise NotImplementedError

    def own_aux(self, stats: tuple[RouterStats, ...], aux: AuxLoss, num_tokens: int) -> Tensor:
        """This rank's part of all auxiliary losses, weighted, []."""
        return aux.local

    def begin(self) -> None:
        """Before a forward pass."""
        self.runtime.begin()

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [m for m in self.modules() if isinstance(m, MoELayer)]

    @torch.compiler.disable
    def forward(self, *micros: MicroBatch) -> ModelOutput | tuple[ModelOutput, ...]:
        """The output of one micro-batch; a tuple for several, which take turns (luffy.exchange.stage)."""
        self.begin()
        outputs = alternate([self._stages(micro) for micro in micros])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    @torch.no_grad()
    def hidden_states(self, micro: MicroBatch) -> Tensor:
        """The stream behind the last block [T, D] for this rank's own tokens, wherever their sequences ended; every
        rank calls it."""
        self.begin()
        batch = finish(self._blocks(micro))
        (hidden,) = transfer([batch.hidden], batch.layout, micro.layout, self.runtime.comm, "control")
        return hidden

    def _blocks(self, micro: MicroBatch) -> Stage[TokenBatch]:
        hidden = self.embed(micro)
        batch = TokenBatch(hidden, micro.layout, micro.padded, micro.memory)
        blocks = self.stack(micro, hidden)
        for i, block in enumerate(blocks):
            batch = yield from block.stages(batch, self._next_predictor(blocks, i))
        return batch

    def _stages(self, micro: MicroBatch) -> Stage[ModelOutput]:
        batch = yield from self._blocks(micro)
        labels, comm = micro.labels, self.runtime.comm
        if batch.layout is not micro.layout:
            (labels,) = transfer([labels], micro.layout, batch.layout, comm, "control")
        token_loss = self.sum_loss(batch.hidden, labels) / max(micro.step_labels, 1)
        token_loss = boundary(token_loss, self.runtime.clock, "other", "other")
        loss, stats = token_loss, batch.router_stats
        aux = auxiliary_loss(stats, self.config.router, comm, micro.num_tokens, micro.seat_strength)
        if aux is not None:
            own = self.own_aux(stats, aux, micro.num_tokens)
            loss = loss + own * (micro.num_tokens / max(micro.step_tokens, 1))
        return ModelOutput(loss, token_loss.detach(), aux, batch.new_memory)

    def _next_predictor(self, blocks: Sequence[StackBlock], index: int) -> Predictor | None:
        """The forecast of the next MoE block, if the recipe or the recorder asks for it and there is one."""
        wanted = self.runtime.looks_ahead or self.runtime.recorder.active
        if blocks[index].moe is None or not wanted:
            return None
        return next((block.predict for block in blocks[index + 1 :] if block.moe is not None), None)


def summed_cross_entropy(logits: Tensor, labels: Tensor) -> Tensor:
    """[T, V] against [T], in float32 at least -> []."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, ignore_index=IGNORE_INDEX, reduction="sum")


def in_chunks(loss: Callable[[Tensor, Tensor], Tensor], hidden: Tensor, labels: Tensor) -> Tensor:
    """Sum of `loss` over chunks of rows of [T, D] and [T]; where there are several, logits are computed again later."""
    pairs = list(zip(hidden.split(LOSS_CHUNK), labels.split(LOSS_CHUNK), strict=True))
    if len(pairs) <= 1 or not torch.is_grad_enabled():
        return torch.stack([loss(h, y) for h, y in pairs]).sum()
    return torch.stack([checkpoint(loss, h, y, use_reentrant=False) for h, y in pairs]).sum()
