"""The MoE layer on one screen: route, decide copies, dispatch, experts, combine.

Every recipe is this one layer; what differs is data (which copies, which order), never the sequence of stages.

What crosses the network is kept for the backward pass and never sent or decided again: under activation checkpointing
(`recompute`) only local work (norm and experts) is computed a second time, from the rows already received. Recomputing
the exchange would pay a slow link twice, and routing anew could choose differently.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from luffy.comm import Comm
from luffy.comm.clock import PhaseClock, boundary
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.exchange import (
    ExpertMap,
    Migration,
    Planner,
    Received,
    Recorder,
    by_table,
    carries_residual,
    codecs_of,
    combine,
    combine_at_new_home,
    copy_keys,
    counts_per_sequence,
    dispatch,
    exchange_counts,
    pairs_by_expert,
    rows_at_favourite,
    weighted_sum,
)
from luffy.exchange.copies import CopyKeys
from luffy.model.experts import GroupedExperts
from luffy.model.layers import FeedForward
from luffy.model.router import Router
from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology
from luffy.recipes import Recipe, check_recipe


class Forecast(NamedTuple):
    """What a later layer is expected to choose: ids [T, K], and the copies that it would make of them."""

    topk_expert_ids: Tensor
    keys: CopyKeys


Predictor = Callable[[Tensor], Forecast]


@dataclass(frozen=True)
class Runtime:
    """What every layer of one model shares: the network, the clock, the recipe, what to recompute.

    topology: of the EP group, for everything that plans. planner: None for recipes that move no sequence.
    """

    comm: Comm
    clock: PhaseClock
    recipe: Recipe
    recompute: bool = False
    planner: Planner | None = None
    topology: Topology | None = None
    recorder: Recorder = field(default_factory=Recorder)

    @classmethod
    def create(
        cls,
        comm: Comm,
        recipe: Recipe,
        config: ModelConfig,
        recompute: bool = False,
        topology: Topology | None = None,
        attention: AttentionCost | None = None,
    ) -> Runtime:
        """The runtime of `recipe` for a model of `config`; raises UserError where the two cannot go together.

        topology: links of the EP group. None: links within a node are taken as ten times as fast as those between.
        attention: its cost, for planning. None: by the paper's formula, at a rate that no plan depends on.
        """
        check_recipe(recipe, config)
        mesh, planner = comm.mesh, None
        if topology is None:
            nodes = [mesh.node_of_rank[r] for r in mesh.ep_ranks]
            topology = Topology(mesh.ep_size, nodes.count(nodes[0]), 1e10, 1e9)
        if recipe.placement != "stay":
            planner = Planner(comm, recipe.placement, topology, attention or AttentionCost(config.hidden_size))
        return cls(comm, PhaseClock(mesh.device), recipe, recompute, planner, topology)


class MoELayer(nn.Module):
    """TokenBatch -> TokenBatch with sum_k g_k E_k(norm(h)) (and the shared experts) added to the stream.

    The block lends its pre-norm (or identity where it norms afterwards). It is applied twice, at home for the router
    and at the experts' rank for the rows, because what travels is the stream itself.
    """

    def __init__(self, config: ModelConfig, runtime: Runtime, layer: int) -> None:
        super().__init__()
        mesh = runtime.comm.mesh
        config.check_ranks(mesh.ep_size)
        E = config.router.num_experts
        self.runtime, self.layer = runtime, layer
        self.router = Router(config.router, config.hidden_size)
        self.experts = GroupedExperts(config, E // mesh.ep_size)
        shared = config.num_shared_experts * config.expert_hidden_size
        self.shared_experts = FeedForward(config, shared) if shared else None
        self.register_buffer("slot_of_expert", torch.arange(E))
        self.slot_of_expert: Tensor

    @property
    def expert_map(self) -> ExpertMap:
        return ExpertMap(self.slot_of_expert, self.experts.num_local)

    def forward(self, batch: TokenBatch, norm: nn.Module, predict_next: Predictor | None = None) -> TokenBatch:
        """`predict_next(hidden)` says which copies the next MoE layer is likely to want; see `Recipe.look_ahead`."""
        rt, mesh, experts = self.runtime, self.runtime.comm.mesh, self.expert_map
        hidden, layout = batch.hidden, batch.layout  # [T, D]
        normed = norm(hidden)
        routing, stats = self.router(normed, layout)
        ids = routing.topk_expert_ids

        hidden = boundary(hidden, rt.clock, "other", "exchange")
        keys = copy_keys(ids, experts, mesh.ep_rank, mesh.ep_size, rt.recipe.copies)
        stats = replace(stats, rows=rows_at_favourite(keys, layout, mesh.ep_size).to(stats.rows.dtype))
        forecast = None if predict_next is None else predict_next(batch.hidden)
        if rt.recorder.active:
            rt.recorder.note(layout, ids, None if forecast is None else forecast.topk_expert_ids)
        forecast = forecast if rt.recipe.look_ahead else None
        wanted = self._what_planners_ask(keys, batch, forecast)
        copies, gathered = exchange_counts(keys, ids, rt.comm, wanted)
        migrations: list[Migration | None] = [None]

        def plan() -> None:
            migrations[0] = self._plan(gathered.numpy(), batch, forecast is not None)

        received = dispatch(
            hidden, ids, routing.topk_weights, copies, rt.recipe.copies,
            global_token=None if rt.planner is None else layout.global_token,
            wire=codecs_of(rt.recipe, "dispatch"), meanwhile=None if rt.planner is None else plan,
        )  # fmt: skip
        migration = migrations[0]
        rows = boundary(received.rows, rt.clock, "exchange", "experts")
        partial = self._run_experts(replace(received, rows=rows), copies.num_pairs, norm)
        if rt.planner is not None:
            rt.planner.confirm(self.layer)
        if migration is not None:
            partial = self._add_residual(partial, replace(received, rows=rows), migration, norm)
        partial = boundary(partial, rt.clock, "experts", "exchange")

        if migration is None:
            hidden = self._base(combine(hidden, partial, copies, codecs_of(rt.recipe, "combine")), normed)
        else:
            orphans = self._orphan_tokens(keys, migration)
            hidden = combine_at_new_home(
                hidden, partial, received, migration, rt.comm, lambda h: self._base(h, norm(h)), orphans
            )
            layout = migration.new
        hidden = boundary(hidden, rt.clock, "exchange", "other")
        return replace(batch, hidden=hidden, layout=layout, router_stats=(*batch.router_stats, stats))

    def _base(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What a token has besides its routed experts: its residual, and the experts that all tokens share."""
        return hidden if self.shared_experts is None else hidden + self.shared_experts(normed)

    def foresee(self, hidden: Tensor, norm: nn.Module) -> Forecast:
        """What this layer would choose for another layer's stream [T, D]; no gradient."""
        rt, mesh = self.runtime, self.runtime.comm.mesh
        with torch.no_grad():
            ids = self.router.choose(norm(hidden))[2]
            return Forecast(ids, copy_keys(ids, self.expert_map, mesh.ep_rank, mesh.ep_size, rt.recipe.copies))

    def _what_planners_ask(self, keys: CopyKeys, batch: TokenBatch, forecast: Forecast | None) -> Tensor | None:
        """int64 [S_max, N + 1 (+ N + 1)]: copies by rank, orphans, and the same predicted for the next layer."""
        if self.runtime.planner is None:
            return None
        N, layout = self.runtime.comm.mesh.ep_size, batch.layout
        num_rows = int(np.bincount(layout.table.home_rank, minlength=N).max())
        parts = [counts_per_sequence(keys, layout, N, num_rows)]
        if forecast is not None:
            parts.append(counts_per_sequence(forecast.keys, layout, N, num_rows))
        return torch.cat(parts, dim=1)

    def _plan(self, gathered: np.ndarray, batch: TokenBatch, looks_ahead: bool) -> Migration | None:
        rt = self.runtime
        assert rt.planner is not None
        N = rt.comm.mesh.ep_size
        table = by_table(gathered, batch.layout.table)  # [S, N + 1 (+ N + 1)]
        next_counts = table[:, N + 1 : 2 * N + 1] if looks_ahead else None
        row_num_bytes = batch.hidden.shape[1] * batch.hidden.element_size()
        return rt.planner.plan(
            self.layer, batch.layout, table[:, :N], table[:, N], next_counts, row_num_bytes, batch.padded
        )

    def _add_residual(self, partial: Tensor, received: Received, migration: Migration, norm: nn.Module) -> Tensor:
        """The residual of tokens whose sequence moves, added by the one rank that carries each of them."""
        carries = carries_residual(received, migration, self.expert_map, self.runtime.comm.mesh.ep_rank)
        if self.shared_experts is None:
            return partial + received.rows * carries[:, None]
        index = carries.nonzero().squeeze(1)  # a read-back on a GPU: cheaper than the shared experts on every row
        rows = received.rows[index]
        return partial.index_add(0, index, self._base(rows, norm(rows)))

    def _orphan_tokens(self, keys: CopyKeys, migration: Migration) -> Tensor | None:
        """Rows of tokens that reached no rank though their sequence moves; only capacity makes any."""
        if self.router.config.capacity_factor is None:
            return None
        moved = torch.from_numpy(migration.moved[migration.old.sequences]).to(keys.rank.device)
        return (~keys.is_copy.any(1) & moved[migration.old.sequence_of_token]).nonzero().squeeze(1)

    def _run_experts(self, received: Received, num_pairs: int, norm: nn.Module) -> Tensor:
        """Partial sums [R, D] over the experts of this rank, one for each received row."""
        pairs = pairs_by_expert(received.expert_ids, self.expert_map, self.runtime.comm.mesh.ep_rank, num_pairs)

        def local_work(rows: Tensor, weights: Tensor) -> Tensor:
            answers = self.experts(norm(rows)[pairs.row], pairs.num_tokens_per_expert)
            return weighted_sum(answers, weights, pairs, rows.shape[0])

        if self.runtime.recompute and torch.is_grad_enabled():
            return checkpoint(local_work, received.rows, received.weights, use_reentrant=False)
        return local_work(received.rows, received.weights)
