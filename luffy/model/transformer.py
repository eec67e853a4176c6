"""Our transformer: embedding, blocks that map a TokenBatch to a TokenBatch, head; the loop and the loss are the
stack's (luffy.model.stack)."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luffy.comm.clock import boundary
from luffy.compose import Runtime
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.exchange.dispatcher import Forecast
from luffy.exchange.stage import Stage
from luffy.model.attention import Attention, remember
from luffy.model.build import moe_layer
from luffy.model.layers import FeedForward, Linear, make_norm
from luffy.model.moe_layer import Predictor
from luffy.model.ownership import expert_parameters
from luffy.model.stack import IGNORE_INDEX, MicroBatch, ModelOutput, Stack, StackBlock, in_chunks, summed_cross_entropy

__all__ = [
    "IGNORE_INDEX",
    "Block",
    "MicroBatch",
    "ModelOutput",
    "Transformer",
    "build_model",
    "initialize",
]


class Block(nn.Module):
    """Attention and feed-forward (dense or MoE), each with its residual; pre- or post-norm."""

    def __init__(self, config: ModelConfig, layer: int, runtime: Runtime) -> None:
        super().__init__()
        self.runtime, self.layer, self.post_norm = runtime, layer, config.norm_placement == "post"
        self.memory_length = config.memory_length
        self.attention_norm = make_norm(config)
        self.attention = Attention(config)
        self.ffn_norm = make_norm(config)
        self.no_norm = nn.Identity()
        self.moe = moe_layer(config, runtime, layer) if config.is_moe_layer(layer) else None
        self.ffn = None if self.moe is not None else FeedForward(config, config.dense_hidden_size)

    def predict(self, hidden: Tensor) -> Forecast:
        """What this block's router would choose for the stream of an earlier one."""
        assert self.moe is not None
        return self.moe.foresee(hidden, self.no_norm if self.post_norm else self.ffn_norm)

    def stages(self, batch: TokenBatch, predict_next: Predictor | None = None) -> Stage[TokenBatch]:
        """The block, yielding where it waits for rows."""
        clock = self.runtime.clock
        departed = None if self.moe is None else self.moe.prefetch(batch.hidden.dtype)
        memory = None if batch.memory is None else batch.memory[self.layer]
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


class Transformer(Stack):
    """One class for all presets: decoder or encoder, pre- or post-norm, three kinds of positions, dense or MoE."""

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

    def embed(self, micro: MicroBatch) -> Tensor:
        hidden = self.token_embedding(micro.tokens)  # [T, D]
        if self.position_embedding is not None:
            hidden = hidden + self.position_embedding(micro.layout.positions)
        if self.embedding_norm is not None:
            hidden = self.embedding_norm(hidden)
        return hidden.to(self.stream_dtype)

    def stack(self, micro: MicroBatch, hidden: Tensor) -> Sequence[StackBlock]:
        return list(self.blocks)  # type: ignore[arg-type]

    def sum_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
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


def build_model(
    config: ModelConfig, runtime: Runtime, *, dtype: torch.dtype = torch.float32, seed: int = 0
) -> Transformer:
    """A model with initialised weights on the mesh's device. `dtype`: bfloat16 keeps float32 master weights."""
    model = Transformer(config, runtime, dtype)
    model.to(torch.float64 if dtype == torch.float64 else torch.float32)
    initialize(model, seed)
    return model.to(runtime.comm.mesh.device)


@torch.no_grad()
def initialize(model: Transformer, seed: int) -> None:
    """Initialise every weight from (seed, its name): the same model at every number of ranks.

    Normal with `init_std`; projections into the stream scaled by 1/sqrt(2 layers) (GPT-2); norms one, biases zero.
    """
    config, mesh, experts = model.config, model.runtime.comm.mesh, expert_parameters(model)
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
        elif name in experts:
            for i in range(p.shape[0]):
                fill(p[i], f"{name}.{mesh.ep_rank * p.shape[0] + i}")
        else:
            fill(p, name)
