"""A Hugging Face causal language model whose experts are spread over ranks, and whose sequences may move.

`parallelize` replaces the feed-forward of every layer that has experts by Luffy's one MoE layer, around the library's
own gate, shared experts and norm. All else (attention, norms, embedding, head) stays the library's module and is called
as it is; only the loop over the layers is ours, from TokenBatch to TokenBatch, so that a sequence can continue on
another rank. The library model itself, `library`, cannot be called any more: it would not know where its rows are.

The loss is a sum over this rank's labels divided by the labels of all ranks: summed over ranks it is the mean that one
process would compute, and gradients are *summed* over ranks too (luffy.train.gradients does so).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import __version__ as transformers_version

from luffy.comm import Comm, Mesh, alike
from luffy.comm.clock import boundary
from luffy.compose import Runtime
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.errors import UserError
from luffy.exchange.dispatcher import Forecast
from luffy.exchange.stage import Stage
from luffy.hf.adapters import adapt, take_adapters
from luffy.hf.attention import Frames, check_attention, mixer_of
from luffy.hf.batches import make_batch
from luffy.hf.dense import DenseUnits
from luffy.hf.describe import describe
from luffy.hf.families import Family, embedding_factor, family_of, halves_of, logits_divisor
from luffy.hf.parts import LibraryExperts, lent
from luffy.model.aux_loss import AuxLoss
from luffy.model.library import LibraryRouter, SharedExperts, call_in
from luffy.model.moe_layer import MoELayer, Predictor
from luffy.model.ownership import check_model
from luffy.model.router import RouterStats
from luffy.model.stack import MicroBatch, Stack, StackBlock, in_chunks, summed_cross_entropy
from luffy.plan.topology import Topology
from luffy.recipes import Recipe, recipe_of

DENSE = ("replicated", "sharded")
_PREFIX = re.compile(r"^library\.(base_model\.model\.)?")


class ParallelModel(Stack):
    """MicroBatch -> ModelOutput, as luffy.model.Transformer. Made by `parallelize` or `load`.

    library: the causal LM, perhaps within a PEFT model. library_balance: weight of the library's own balance loss.
    """

    def __init__(
        self,
        library: nn.Module,
        family: Family,
        config: ModelConfig,
        runtime: Runtime,
        stream_dtype: torch.dtype,
        library_balance: float,
    ) -> None:
        super().__init__()
        self.library, self.family, self.config, self.runtime = library, family, config, runtime
        self.stream_dtype, self.library_balance = stream_dtype, library_balance
        # Of the folder that it was loaded from, if any: where it is, and what its weights are stored as.
        self.folder: Path | None = None
        self.stored_dtype: torch.dtype | None = None
        self.tokenizer: Path | None = None  # folder of a tokenizer that takes the place of the folder's own
        self.units: DenseUnits | None = None  # of dense weights that are sharded

    @property
    def causal_lm(self) -> Any:
        """The library's model, out of its PEFT wrapping if it has one."""
        return causal_lm_of(self.library)

    @property
    def layers(self) -> list[Any]:
        return list(self.causal_lm.model.layers)

    def block(self, layer: Any) -> Any:
        return getattr(layer, self.family.block)

    def library_name(self, name: str) -> str:
        """A parameter's name as the library has it: without what `parallelize` and PEFT put around modules."""
        return self.library_path(_PREFIX.sub("", name).replace(".base_layer.", "."))

    def library_path(self, name: str) -> str:
        """The same with PEFT's parts left in."""
        family = self.family
        name = name.replace(".router.gate.", f".{family.gate}.")
        if family.bias_buffer is not None:
            name = name.replace(f".router.{family.bias_buffer}", f".{family.bias_buffer}")
        name = name.replace(".shared_experts.module.", f".{family.shared}.")
        return name.replace(".shared_experts.gate.", f".{family.shared_gate}.")

    def batch(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
              position_ids: Tensor | None = None, padded: bool = False) -> MicroBatch:  # fmt: skip
        """This rank's [B, L] as its part of a micro-batch; every rank calls it. See luffy.hf.batches."""
        return make_batch(self.runtime.comm, input_ids, attention_mask, labels, position_ids, padded)

    def adapt(self, rank: int, **options: Any) -> None:
        """LoRA adapters, all else frozen; options: on, alpha, seed, dora, tokens of luffy.hf.adapters.adapt."""
        adapt(self, rank, **options)

    def shard_dense(self) -> None:
        """Keep only this rank's part of the dense weights, from now on: see luffy.hf.dense. Before an optimizer."""
        blocks = [self.block(layer) for layer in self.layers]
        self.units = DenseUnits(self.runtime.comm, self.causal_lm, blocks, self.stream_dtype)

    # ---------------------------------------------------------------- forward

    def begin(self) -> None:
        super().begin()
        if self.units is not None:
            self.units.begin()

    def embed(self, micro: MicroBatch) -> Tensor:
        embedding = self.causal_lm.get_input_embeddings()
        if self.units is not None:
            rows = self.units.embed(embedding, micro.tokens)
        else:
            rows = embedding(micro.tokens).to(self.stream_dtype)
        factor = embedding_factor(self.causal_lm)
        return rows if factor == 1 else rows * factor

    def stack(self, micro: MicroBatch, hidden: Tensor) -> list[StackBlock]:
        lm, longest = self.causal_lm, int(micro.layout.table.lengths.max(initial=0))
        frames = Frames(lm.config, lm.model.rotary_emb, longest, hidden, micro.padded)
        return [LibraryBlock(self, layer, i, frames) for i, layer in enumerate(self.layers)]

    def sum_loss(self, hidden: Tensor, labels: Tensor) -> Tensor:
        def chunk_loss(hidden: Tensor, labels: Tensor) -> Tensor:
            return summed_cross_entropy(self._head(hidden), labels)

        # The unit is entered once: how many chunks there are depends on the rank.
        head = None if self.units is None else self.units.head
        if head is None:
            return in_chunks(chunk_loss, hidden, labels)
        return head.leave(in_chunks(chunk_loss, head.enter(hidden), labels), keep=torch.is_grad_enabled())

    def own_aux(self, stats: tuple[RouterStats, ...], aux: AuxLoss, num_tokens: int) -> Tensor:
        if not self.library_balance:
            return aux.local
        return aux.local + self.library_balance * self._library_balance(stats, aux, num_tokens)

    @torch.no_grad()
    def logits(self, micro: MicroBatch) -> Tensor:
        """Logits [T, V] of this rank's own tokens, wherever their sequences ended; every rank calls it."""
        hidden = self.hidden_states(micro)
        if self.units is None:
            return self._head(hidden)
        return self.units.head.leave(self._head(self.units.head.enter(hidden)))

    def _head(self, hidden: Tensor) -> Tensor:
        lm = self.causal_lm
        hidden = call_in(hidden.dtype, lm.model.norm, hidden)
        logits = call_in(hidden.dtype, lm.get_output_embeddings(), hidden)
        divisor = logits_divisor(lm)
        return logits if divisor == 1 else logits / divisor

    def _library_balance(self, stats: tuple[RouterStats, ...], aux: AuxLoss, num_tokens: int) -> Tensor:
        """This rank's part of the library's `load_balancing_loss_func`, over the tokens of all ranks.

        It is E * sum_e f_e P_e with f and P averaged over all layers before they are multiplied, and f summing to
        top_k: not the sum over layers that `balance_loss` is.
        """
        E, K, L = self.config.router.num_experts, self.config.router.top_k, len(stats)
        load = aux.totals.load.mean(0) * K  # [E]
        probability = torch.stack([s.probability_sum for s in stats]).sum(0) / (L * max(num_tokens, 1))  # [E], local
        return E * (load * probability).sum()


class LibraryBlock:
    """One decoder layer in one forward pass: attention and feed-forward, each with its norm before and its residual."""

    def __init__(self, model: ParallelModel, layer: Any, index: int, frames: Frames) -> None:
        self.model, self.layer, self.index, self.frames = model, layer, index, frames
        self.block, self.norm = model.block(layer), lent(layer.post_attention_layernorm)
        self.attention, self.feed_forward = halves_of(layer)

    @property
    def moe(self) -> MoELayer | None:
        return self.block if isinstance(self.block, MoELayer) else None

    def predict(self, hidden: Tensor) -> Forecast:
        return self.block.foresee(hidden, self.norm)

    def stages(self, batch: TokenBatch, predict_next: Predictor | None = None) -> Stage[TokenBatch]:
        rt, layer, units = self.model.runtime, self.layer, self.model.units
        unit = None if units is None else units.layers[self.index]
        if unit is not None:
            batch = batch.with_hidden(unit.enter(batch.hidden))
        departed = None if self.moe is None else self.moe.prefetch(batch.hidden.dtype)
        hidden, layout = boundary(batch.hidden, rt.clock, "other", "attention"), batch.layout

        def attend(x: Tensor) -> Tensor:
            normed = call_in(x.dtype, layer.input_layernorm, x)
            answer = self.frames.attend(mixer_of(layer), self.index, normed, layout)
            return self.attention.start(x, normed) + self.attention.scaled(answer)

        if rt.recompute and torch.is_grad_enabled():
            hidden = checkpoint(attend, hidden, use_reentrant=False)
        else:
            hidden = attend(hidden)
        batch = batch.with_hidden(boundary(hidden, rt.clock, "attention", "other"))
        half, x = self.feed_forward, batch.hidden
        if self.moe is not None:  # its scale is in the weights
            norm, kept = self.norm, half.kept
            if kept is not None:  # what travels has its norm already
                batch, norm = batch.with_hidden(half.start(x, norm(x))), lambda rows: rows / kept
            batch = yield from self.moe.stages(batch, norm, predict_next, departed)
        else:
            normed = self.norm(x)
            batch = batch.with_hidden(half.start(x, normed) + half.scaled(call_in(x.dtype, self.block, normed)))
        return batch if unit is None else batch.with_hidden(unit.leave(batch.hidden))


def causal_lm_of(model: nn.Module) -> Any:
    """The library's causal LM within a PEFT model, or the model itself."""
    inner = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def parallelize(
    model: nn.Module,
    mesh: Mesh,
    recipe: str | Recipe = "luffy",
    *,
    family: Family | None = None,
    stream_dtype: torch.dtype | None = None,
    recompute: bool | None = None,
    topology: Topology | None = None,
    check_alike: bool = True,
    dense: str = "replicated",
    **router: Any,
) -> ParallelModel:
    """Spread the experts of a transformers causal LM (or of a PEFT model around one) over the ranks of `mesh`.

    Every rank calls it with the same model; each keeps its experts of each layer and drops the others. The model is
    changed in place and lives on as `.library`. Raises UserError for models that cannot be run so.

    family: how the model is built, None: by its `model_type`. stream_dtype: of the rows and products, None: the
    weights'. recompute: compute attention and experts again in the backward pass, None: as gradient checkpointing is
    set in the model. topology: links, for planning. dense: "sharded" divides the other weights over all ranks, each
    gathered while its layer is computed. router: weights of Luffy's losses, `balance_loss`, `z_loss`, `locality_loss`,
    and `bias_update_rate` (see RouterConfig); all are 0 unless given. The library's own balance loss is added where the
    model's configuration asks for it, `output_router_logits` with its `router_aux_loss_coef`.
    """
    lm = causal_lm_of(model)
    if dense not in DENSE:
        raise UserError(f"--dense {dense!r} must be one of {', '.join(DENSE)}")
    config = lm.config
    family = family_of(config) if family is None else family
    check_attention(config)
    facts = {"recipe": recipe, "dense": dense, "stream_dtype": stream_dtype, "recompute": recompute, **router}
    facts |= {"the configuration": config.to_json_string(use_diff=False), "transformers": transformers_version}
    alike.check_alike(alike.code_facts() | facts, mesh.device)
    layers = list(lm.model.layers)
    dense_layers = tuple(i for i, layer in enumerate(layers) if not family.is_sparse(layer))
    described = describe(config, family, dense_layers, **router)
    described.check_ranks(mesh.ep_size)
    if described.router.bias_update_rate > 0 and family.bias_buffer is None:
        raise UserError(f"--bias-update-rate: the gate of {family.model_type} has no bias for the choice")
    recipe = recipe_of(recipe)
    if family.weighs_input and recipe.condense != "none":
        raise UserError(
            f"--recipe {recipe.name}: {family.model_type} weighs what its experts are given, so that one answer cannot "
            "serve several tokens; use a recipe without condensation (--condense none)"
        )
    if recompute is None:
        recompute = any(getattr(m, "gradient_checkpointing", False) for m in lm.modules())
    runtime = Runtime.create(Comm.create(mesh), recipe, described, recompute, topology)
    sparse = [i for i in range(len(layers)) if i not in dense_layers]
    for nth, i in enumerate(sparse):
        _spread(layers[i], family, described, runtime, i, nth)
    lm.register_forward_pre_hook(_refuse)
    weights_dtype = cast(Tensor, lm.get_input_embeddings().weight).dtype
    balance = getattr(config, "router_aux_loss_coef", 0.0) if getattr(config, "output_router_logits", False) else 0.0
    parallel = ParallelModel(model, family, described, runtime, stream_dtype or weights_dtype, float(balance))
    if not any(p.is_meta for p in parallel.parameters()):
        parallel.to(mesh.device)
        if check_alike:
            check_model(parallel, mesh)
    if dense == "sharded":
        parallel.shard_dense()
    return parallel


def _spread(layer: Any, family: Family, described: ModelConfig, runtime: Runtime, index: int, nth: int) -> None:
    """Put a MoELayer around the parts of a layer's block, with this rank's experts. nth: among layers with experts."""
    block, mesh, scale = getattr(layer, family.block), runtime.comm.mesh, halves_of(layer)[1].scale
    num_local, buffer, shared = described.router.num_experts // mesh.ep_size, family.bias_buffer, None
    if family.shared is not None:
        gate = None if family.shared_gate is None else getattr(block, family.shared_gate)
        shared = SharedExperts(getattr(block, family.shared), gate, scale)
    bias = None if buffer is None else block._buffers.get(buffer)
    adapters, activate = take_adapters(block), family.activate(block)
    replacement = MoELayer(
        runtime,
        index,
        router=LibraryRouter(getattr(block, family.gate), described.router, buffer, bias, scale),
        experts=LibraryExperts(block.experts, family, activate, num_local, mesh.ep_rank * num_local, adapters),
        shared_experts=shared,
        layer_of_moe=nth,
    )
    setattr(layer, family.block, replacement.train(block.training))


def _refuse(module: nn.Module, arguments: Any) -> None:
    raise UserError("the library's model has given its experts away: call the parallel model, with what .batch() makes")
