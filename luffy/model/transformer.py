"""The transformer: embedding, blocks that map a TokenBatch to a TokenBatch, head and loss.

One class serves all presets: decoder or encoder, pre- or post-norm, three kinds of positions, dense or MoE
feed-forward. The loss is a *sum* over this rank's tokens divided by the number of labels of the whole step on all
ranks, so that gradients summed over ranks and micro-batches are those of the global mean, however unevenly the tokens
are spread.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luffy.comm.clock import boundary
from luffy.config import ModelConfig
from luffy.data.batch import Layout, TokenBatch
from luffy.exchange.migrate import transfer
from luffy.exchange.stage import Stage, alternate
from luffy.model.attention import Attention, remember
from luffy.model.aux_loss import AuxLoss, auxiliary_loss
from luffy.model.layers import FeedForward, Linear, make_norm
from luffy.model.moe_layer import Forecast, MoELayer, Predictor, Runtime

IGNORE_INDEX = -100
# Rows of logits held at once: 8192 x 50k x 4 bytes is 1.6 GB; the rest is recomputed in the backward pass.
LOSS_CHUNK = 8192


@dataclass(frozen=True)
class MicroBatch:
    """Input of one forward pass on one rank.

    tokens, labels: int64 [T], sequences end to end as `layout` says; labels are IGNORE_INDEX where there is none.
    num_tokens: tokens of this micro-batch on all ranks. step_tokens, step_labels: tokens and labels of the whole
    optimizer step on all ranks, which is more where gradients are accumulated.
    memory: see TokenBatch.
    """

    tokens: Tensor
    labels: Tensor
    layout: Layout
    num_tokens: int
    step_tokens: int
    step_labels: int
    padded: bool = False
    memory: tuple[Tensor, ...] | None = None


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


class Block(nn.Module):
    """Attention and feed-forward (dense or MoE), each with its residual; pre- or post-norm."""

    def __init__(self, config: ModelConfig, layer: int, runtime: Runtime) -> None:
        super().__init__()
        self.runtime, self.post_norm = runtime, config.norm_placement == "post"
        self.memory_length = config.memory_length
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.no_norm = nn.Identity()
        self.moe = MoELayer.build(config, runtime, layer) if config.is_moe_layer(layer) else None
        self.ffn = None if self.moe is not None else FeedForward(config, config.dense_hidden_size)

    def predict(self, hidden: Tensor) -> Forecast:
        """What this block's router would choose for the stream of an earlier one."""
        assert self.moe is not None
        return self.moe.foresee(hidden, self.no_norm if self.post_norm else self.ffn_norm)

    def stages(
        self, batch: TokenBatch, memory: Tensor | None = None, predict_next: Predictor | None = None
    ) -> Stage[TokenBatch]:
        """The block, yielding where it waits for rows."""
        clock = self.runtime.clock
        departed = None if self.moe is None else self.moe.prefetch(batch.hidden.dtype)
        hidden = boundary(batch.hidden, clock, "other", "attention")
        if self.memory_length:
            batch = remember(batch, hidden, memory, self.memory_length)
        if self.runtime.recompute and torch.is_grad_enabled():
            hidden = checkpoint(self._attend, hidden, batch, memory, use_reentrant=False)
        else:
            hidden = self._attend(hidden, batch, memory)
        batch = batch.with_hidden(boundary(hidden, clock, "attention", "other"))

        if self.moe is not None:
            norm = self.no_norm if self.post_norm else self.ffn_norm
            batch = yield from self.moe.stages(batch, norm, predict_next, departed)
        elif self.post_norm:
            batch = batch.with_hidden(batch.hidden + self.ffn(batch.hidden))  # type: ignore[misc]
        else:
            batch = batch.with_hidden(batch.hidden + self.ffn(self.ffn_norm(batch.hidden)))  # type: ignore[misc]
        return batch.with_hidden(self.ffn_norm(batch.hidden)) if self.post_norm else batch

    def _attend(self, hidden: Tensor, batch: TokenBatch, memory: Tensor | None) -> Tensor:
        if self.post_norm:
            return self.attention_norm(hidden + self.attention(hidden, batch, memory))
        memory = None if memory is None else self.attention_norm(memory.to(hidden.dtype))
        return hidden + self.attention(self.attention_norm(hidden), batch, memory)


class Transformer(nn.Module):
    """MicroBatch -> ModelOutput. `dtype` is that of the residual stream and of all matrix products."""

    def __init__(self, config: ModelConfig, runtime: Runtime, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.runtime, self.stream_dtype = config, runtime, dtype
        D, V = config.hidden_size, config.vocab_size
        self.token_embedding = nn.Embedding(V, D)
        self.position_embedding = nn.Embedding(config.max_sequence_length, D) if config.position == "learned" else None
        self.embedding_norm = make_norm(config) if config.norm_placement == "post" else None
        self.blocks = nn.ModuleList(Block(config, i, runtime) for i in range(config.num_layers))
        self.final_norm = make_norm(config) if config.norm_placement == "pre" else None
        # BERT's masked-LM head transforms before it decodes.
        self.head_transform = None if config.causal else Linear(D, D, bias=config.bias)
        self.head_norm = None if config.causal else make_norm(config)
        self.head = None if config.tie_embeddings else nn.Parameter(torch.empty(V, D))

    @property
    def moe_layers(self) -> list[MoELayer]:
        return [b.moe for b in self.blocks if b.moe is not None]  # type: ignore[misc]

    def forward(self, *micros: MicroBatch) -> ModelOutput | tuple[ModelOutput, ...]:
        """The output of one micro-batch; a tuple for several, which take turns (luffy.exchange.stage)."""
        if self.runtime.residency is not None:
            self.runtime.residency.reset()
        outputs = alternate([self._stages(micro) for micro in micros])
        return outputs[0] if len(outputs) == 1 else tuple(outputs)

    def _stages(self, micro: MicroBatch) -> Stage[ModelOutput]:
        hidden = self.token_embedding(micro.tokens)  # [T, D]
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(micro.layout.positions)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        batch = TokenBatch(hidden.to(self.stream_dtype), micro.layout, micro.padded, micro.memory)
        for i, block in enumerate(self.blocks):
            memory = None if micro.memory is None else micro.memory[i]
            batch = yield from block.stages(batch, memory, self._next_predictor(i))  # type: ignore[operator]
        labels = micro.labels
        if batch.layout is not micro.layout:
            (labels,) = transfer([labels], micro.layout, batch.layout, self.runtime.comm, "control")
        token_loss = self._token_loss(batch.hidden, labels) / max(micro.step_labels, 1)
        token_loss = boundary(token_loss, self.runtime.clock, "other", "other")
        aux = auxiliary_loss(batch.router_stats, self.config.router, self.runtime.comm, micro.num_tokens)
        loss = token_loss
        if aux is not None:
            loss = loss + aux.local * (micro.num_tokens / max(micro.step_tokens, 1))
        return ModelOutput(loss, token_loss.detach(), aux, batch.new_memory)

    def _next_predictor(self, layer: int) -> Predictor | None:
        """The forecast of the next MoE block, if the recipe or the recorder asks for it and there is one."""
        moe = self.blocks[layer].moe
        if moe is None or not (moe.recipe.look_ahead or self.runtime.recorder.active):  # type: ignore[union-attr]
            return None
        for block in self.blocks[layer + 1 :]:
            if block.moe is not None:
                return cast(Predictor, block.predict)
        return None

    def _token_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        """Summed cross-entropy of [T, D] against [T], a chunk of rows at a time."""
        if self.final_norm is not None:
            hidden = self.final_norm(hidden)
        return in_chunks(self._chunk_loss, hidden, labels)

    def _chunk_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        if self.head_transform is not None and self.head_norm is not None:
            hidden = self.head_norm(F.gelu(self.head_transform(hidden), approximate="tanh"))
        weight = self.token_embedding.weight if self.head is None else self.head
        logits = hidden @ weight.to(hidden.dtype).t()  # [T, V]
        return summed_cross_entropy(logits, labels)


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


def build_model(
    config: ModelConfig, runtime: Runtime, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Transformer:
    """A model with initialised weights on the mesh's device. `dtype`: bfloat16 keeps float32 master weights."""
    model = Transformer(config, runtime, dtype)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    initialize(model, seed)
    return model.to(runtime.comm.mesh.device)


def is_expert(name: str) -> bool:
    """Whether a parameter of `Transformer` belongs to experts. For any other model: luffy.model.expert_parameters."""
    return ".experts." in name


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Initialise every weight from (seed, its name): the same model at every number of ranks.

    Normal with `init_std`; projections into the stream scaled by 1/sqrt(2 layers) (GPT-2); norms one, biases zero.
    """
    config, mesh = model.config, model.runtime.comm.mesh
    scale_out = (2 * config.num_layers) ** -0.5
    norms = {n for n, m in model.named_modules() if "norm" in n.rsplit(".", 1)[-1]}

    def fill(p: Tensor, name: str) -> None:
        digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
        std = config.init_std * (scale_out if name.endswith(("w_out", "w_out.weight", "out.weight")) else 1.0)
        # Drawn in float32 whatever the parameter's dtype, so that a float64 model starts from the same numbers.
        p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float32) * std)

    for name, p in model.named_parameters():
        module, leaf = name.rsplit(".", 1)[0] if "." in name else "", name.rsplit(".", 1)[-1]
        if module in norms:
            p.fill_(1.0 if leaf == "weight" else 0.0)
        elif leaf in ("bias", "b_in", "b_out", "content_bias", "position_bias"):
            p.zero_()
        elif is_expert(name):
            for i in range(p.shape[0]):
                fill(p[i], f"{name}.{mesh.ep_rank * p.shape[0] + i}")
        else:
            fill(p, name)
