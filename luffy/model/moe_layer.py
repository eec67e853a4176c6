"""The MoE layer on one screen: norm, route, dispatch, experts, combine.

Every recipe is this one layer; what differs is the dispatcher (luffy.exchange.dispatcher), which luffy.compose makes.
What crosses the network is kept for the backward pass and never sent or decided again: under activation checkpointing
(`recompute`) only norm and experts are computed twice, from the rows already received: no link is paid twice.
Where rows travel the layer yields (luffy.exchange.stage), so that another micro-batch may compute in the meantime.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luffy.compose import Runtime
from luffy.data.batch import TokenBatch
from luffy.exchange.copies import ExpertMap, copy_keys
from luffy.exchange.dispatcher import Forecast, Norm, Received, Tokens
from luffy.exchange.guests import Departed
from luffy.exchange.permute import pairs_by_expert
from luffy.exchange.stage import Stage, finish
from luffy.model.experts import Experts
from luffy.model.latent import LatentRows
from luffy.model.observe import observe
from luffy.model.rank_state import mark_state
from luffy.model.router import RouterBase

Predictor = Callable[[Tensor], Forecast]


class MoELayer(nn.Module):
    """TokenBatch -> TokenBatch with sum_k g_k E_k(norm(h)) (and the shared experts) added to the stream.

    The block lends its pre-norm (or identity where it norms afterwards). It is applied twice, at home for the router
    and at the experts' rank for the rows, because what travels is the stream itself. The parts are given, by
    luffy.model.build or luffy.hf. router: rows to Routing and RouterStats. experts: this rank's share of them. latent:
    where rows are narrower than the stream. layer_of_moe: index of this layer among the model's MoE layers. residual:
    False leaves the stream out of the sum, for a model that adds it itself; sequences then stay where they are.
    """

    def __init__(
        self,
        runtime: Runtime,
        layer: int,
        *,
        router: RouterBase,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        latent: LatentRows | None = None,
        layer_of_moe: int = 0,
        causal: bool = True,
        residual: bool = True,
    ) -> None:
        super().__init__()
        self.runtime, self.layer, self.layer_of_moe, self.residual = runtime, layer, layer_of_moe, residual
        self.router, self.experts, self.shared_experts, self.latent = router, experts, shared_experts, latent
        may_drop = router.config.capacity_factor is not None
        self.dispatcher = runtime.dispatcher(layer, layer_of_moe, experts, causal=causal, may_drop=may_drop)
        self.register_buffer("slot_of_expert", torch.arange(router.config.num_experts))
        self.slot_of_expert: Tensor
        mark_state(self, runtime.comm.mesh)

    @property
    def expert_map(self) -> ExpertMap:
        return ExpertMap(self.slot_of_expert, self.experts.num_local)

    def prefetch(self, dtype: torch.dtype) -> Departed | None:
        """Begin to fetch experts that this rank is likely to want, if the recipe fetches any: call before attention."""
        return self.dispatcher.prefetch(self.expert_map, dtype)

    def forward(self, batch: TokenBatch, norm: Norm) -> TokenBatch:
        return finish(self.stages(batch, norm))

    def stages(
        self, batch: TokenBatch, norm: Norm, predict_next: Predictor | None = None, departed: Departed | None = None
    ) -> Stage[TokenBatch]:
        """predict_next(hidden): what the next MoE layer is likely to choose. departed: of `prefetch`."""

        def base(rows: Tensor, normed: Tensor | None = None) -> Tensor:
            if self.shared_experts is None:
                return rows
            return rows + self.shared_experts(norm(rows) if normed is None else normed)

        normed = norm(batch.hidden)  # [T, D]
        routing, stats = self.router(normed, batch.layout, self.slot_of_expert)
        tokens = Tokens(
            batch, normed, routing.topk_expert_ids, routing.topk_weights, self.expert_map, norm, base, self.residual,
            condenses=self.training and torch.is_grad_enabled(), departed=departed,
        )  # fmt: skip
        tokens = observe(tokens, predict_next, self.runtime)
        sent = tokens if self.latent is None else self.latent.narrowed(tokens)
        received = yield from self.dispatcher.dispatch(sent)
        if received.condensed is not None:
            stats = replace(stats, condensed_counts=received.condensed.counts())
        after = yield from self.dispatcher.combine(sent, received, self._run_experts(received))
        after = after if self.latent is None else self.latent.widened(tokens, after)
        return replace(after, router_stats=(*batch.router_stats, stats))

    def foresee(self, hidden: Tensor, norm: Norm) -> Forecast:
        """What this layer would choose for another layer's stream [T, D]; no gradient."""
        with torch.no_grad():
            ids = self.router.choose(norm(hidden))[2]
            return Forecast(ids, copy_keys(ids, self.expert_map, self.runtime.comm.mesh.ep_rank, "ranks"))

    def _run_experts(self, received: Received) -> Tensor:
        """Partial sums [R, D] over the experts of this rank and its guests, one for each received row."""
        experts, ep_rank = received.experts, self.runtime.comm.mesh.ep_rank
        source = received.source_for(experts)
        pairs = pairs_by_expert(received.expert_ids, experts, ep_rank, received.num_pairs, source)

        def local_work(rows: Tensor, weights: Tensor, residual: Tensor | None) -> Tensor:
            return self.experts(received.norm(rows), weights, pairs, received.guests, residual)

        given = received.rows, received.weights, received.residual
        if self.runtime.recompute and torch.is_grad_enabled():
            return checkpoint(local_work, *given, use_reentrant=False)
        return local_work(*given)
