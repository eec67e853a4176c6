"""The MoE layer on one screen: route, decide copies, dispatch, experts, combine.

Every recipe is this one layer; what differs is data (which copies, which order), never the sequence of stages.

What crosses the network is kept for the backward pass and never sent or decided again: under activation checkpointing
(`recompute`) only local work (norm and experts) is computed a second time, from the rows already received. Recomputing
the exchange would pay a slow link twice, and routing anew could choose differently.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luffy.comm import Comm
from luffy.comm.clock import PhaseClock, boundary
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.exchange import (
    ExpertMap,
    Received,
    combine,
    copy_keys,
    dispatch,
    exchange_counts,
    pairs_by_expert,
    weighted_sum,
)
from luffy.model.experts import GroupedExperts
from luffy.model.layers import FeedForward
from luffy.model.router import Router
from luffy.recipes import Recipe


@dataclass(frozen=True)
class Runtime:
    """What every layer of one model shares: the network, the clock, the recipe, what to recompute."""

    comm: Comm
    clock: PhaseClock
    recipe: Recipe
    recompute: bool = False


class MoELayer(nn.Module):
    """TokenBatch -> TokenBatch with sum_k g_k E_k(norm(h)) (and the shared experts) added to the stream.

    The block lends its pre-norm (or identity where it norms afterwards). It is applied twice, at home for the router
    and at the experts' rank for the rows, because what travels is the stream itself.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime) -> None:
        super().__init__()
        mesh = runtime.comm.mesh
        config.check_ranks(mesh.ep_size)
        E = config.router.num_experts
        self.runtime = runtime
        self.router = Router(config.router, config.hidden_size)
        self.experts = GroupedExperts(config, E // mesh.ep_size)
        shared = config.num_shared_experts * config.expert_hidden_size
        self.shared_experts = FeedForward(config, shared) if shared else None
        self.register_buffer("slot_of_expert", torch.arange(E))
        self.slot_of_expert: Tensor

    @property
    def expert_map(self) -> ExpertMap:
        return ExpertMap(self.slot_of_expert, self.experts.num_local)

    def forward(self, batch: TokenBatch, norm: nn.Module) -> TokenBatch:
        rt, mesh, experts = self.runtime, self.runtime.comm.mesh, self.expert_map
        hidden = batch.hidden  # [T, D]
        normed = norm(hidden)
        routing, stats = self.router(normed, batch.layout)
        if self.shared_experts is not None:
            shared = self.shared_experts(normed)

        hidden = boundary(hidden, rt.clock, "other", "exchange")
        ids = routing.topk_expert_ids
        keys = copy_keys(ids, experts, mesh.ep_rank, mesh.ep_size, rt.recipe.copies)
        copies, _ = exchange_counts(keys, ids, rt.comm)
        received = dispatch(hidden, ids, routing.topk_weights, copies, rt.recipe.copies)
        rows = boundary(received.rows, rt.clock, "exchange", "experts")

        partial = self._run_experts(replace(received, rows=rows), copies.num_pairs, norm)
        partial = boundary(partial, rt.clock, "experts", "exchange")

        hidden = combine(hidden, partial, copies)
        hidden = boundary(hidden, rt.clock, "exchange", "other")
        if self.shared_experts is not None:
            hidden = hidden + shared
        return replace(batch, hidden=hidden, router_stats=(*batch.router_stats, stats))

    def _run_experts(self, received: Received, num_pairs: int, norm: nn.Module) -> Tensor:
        """Partial sums [R, D] over the experts of this rank, one for each received row."""
        pairs = pairs_by_expert(received.expert_ids, self.expert_map, self.runtime.comm.mesh.ep_rank, num_pairs)

        def local_work(rows: Tensor, weights: Tensor) -> Tensor:
            answers = self.experts(norm(rows)[pairs.row], pairs.num_tokens_per_expert)
            return weighted_sum(answers, weights, pairs, rows.shape[0])

        if self.runtime.recompute and torch.is_grad_enabled():
            return checkpoint(local_work, received.rows, received.weights, use_reentrant=False)
        return local_work(received.rows, received.weights)
