"""The MoE layer on one screen: route, decide copies, dispatch, experts, combine.

Every recipe is this one layer; what differs is data (which copies, which order), never the sequence of stages.

What crosses the network is kept for the backward pass and never sent or decided again: under activation checkpointing
(`recompute`) only local work (norm and experts) is computed a second time, from the rows already received. Recomputing
the exchange would pay a slow link twice, and routing anew could choose differently.

Where rows travel the layer yields (luffy.exchange.stage), so that another micro-batch may compute in the meantime.
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
from luffy.condensation import parse_condense
from luffy.config import ModelConfig
from luffy.data.batch import TokenBatch
from luffy.exchange import (
    Condensed,
    CondenseState,
    Draws,
    ExpertMap,
    History,
    Migration,
    Planned,
    Planner,
    Received,
    Recorder,
    SharedAnswers,
    Stage,
    all_local,
    alone_per_sequence,
    by_table,
    carries_residual,
    choices_per_sequence,
    codecs_of,
    combine,
    combine_at_new_home,
    combine_condensed,
    condense,
    copy_keys,
    counts_per_sequence,
    dispatch,
    exchange_counts,
    finish,
    only_sent,
    orphan_tokens,
    own_shared,
    pairs_by_expert,
    residual_codec,
    rows_at_favourite,
    rows_to_send,
    tally,
    weighted_sum,
)
from luffy.exchange.copies import CopyKeys
from luffy.exchange.guests import Departed
from luffy.exchange.wire import WireCodecs
from luffy.model.experts import Experts, GroupedExperts
from luffy.model.layers import FeedForward
from luffy.model.rank_state import mark_state
from luffy.model.residency import LayerResidency, ResidencyState
from luffy.model.router import Router, RouterBase
from luffy.plan.cost import AttentionCost
from luffy.plan.outlook import expected_rows
from luffy.plan.topology import Topology
from luffy.recipes import Recipe, check_recipe


class Forecast(NamedTuple):
    """What a later layer is expected to choose: ids [T, K], and the copies that it would make of them."""

    topk_expert_ids: Tensor
    keys: CopyKeys


Predictor = Callable[[Tensor], Forecast]
Norm = Callable[[Tensor], Tensor]  # lent by the block: rows of the stream to what router and experts see


@dataclass(frozen=True)
class Runtime:
    """What every layer of one model shares: the network, the clock, the recipe, what to recompute.

    topology: of the EP group, for everything that plans. planner: None for recipes that move no sequence.
    condense: None for recipes that condense no tokens. residency: None for recipes that leave experts where they are.
    draws: where random rounding is in the run.
    """

    comm: Comm
    clock: PhaseClock
    recipe: Recipe
    recompute: bool = False
    planner: Planner | None = None
    topology: Topology | None = None
    condense: CondenseState | None = None
    residency: ResidencyState | None = None
    _streams: list[torch.cuda.Stream] = field(default_factory=list)
    recorder: Recorder = field(default_factory=Recorder)
    draws: Draws = field(default_factory=lambda: Draws(0))

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
        scheme = parse_condense(recipe.condense)
        state = None if scheme is None else CondenseState(scheme, [scheme.level] * config.num_moe_layers)
        residency = None
        if (recipe.residency != "static" or recipe.auto) and mesh.ep_size > 1:
            residency = ResidencyState(topology)
        draws = Draws(mesh.rank)
        return cls(comm, PhaseClock(mesh.device), recipe, recompute, planner, topology, state, residency, draws=draws)

    def side_stream(self) -> torch.cuda.Stream:
        """A stream of its own for work that the layer does not wait for at once.

        It waits for the main stream before each use, so what it allocated is never reused while still being read.
        """
        if not self._streams:
            self._streams.append(torch.cuda.Stream(self.comm.mesh.device))
        return self._streams[0]


class MoELayer(nn.Module):
    """TokenBatch -> TokenBatch with sum_k g_k E_k(norm(h)) (and the shared experts) added to the stream.

    The block lends its pre-norm (or identity where it norms afterwards). It is applied twice, at home for the router
    and at the experts' rank for the rows, because what travels is the stream itself.

    The parts are given: `build` makes those of a ModelConfig, luffy.hf those of another library's block. router: rows
    to Routing and RouterStats. experts: this rank's share of them, `num_local` in the order of their ids.
    layer_of_moe: index of this layer among the model's MoE layers, which later_moe_layers follow.
    """

    def __init__(
        self,
        runtime: Runtime,
        layer: int,
        *,
        router: RouterBase,
        experts: Experts,
        shared_experts: nn.Module | None = None,
        layer_of_moe: int = 0,
        later_moe_layers: int = 0,
        causal: bool = True,
    ) -> None:
        super().__init__()
        self.runtime, self.layer = runtime, layer
        # Of this layer: `auto` begins as vanilla_dedup, and changes it.
        recipe = runtime.recipe
        at_first = replace(recipe, placement="stay", look_ahead=False, wire="model") if recipe.auto else recipe
        self.recipe = at_first.at_layer(layer_of_moe)
        self.router = router
        self.experts = experts
        self.shared_experts = shared_experts
        self.causal, self.no_norm = causal, nn.Identity()
        self.layer_of_moe = layer_of_moe
        self.register_buffer("slot_of_expert", torch.arange(router.config.num_experts))
        self.slot_of_expert: Tensor
        if self.settles:
            # What this layer's choices foretell of the later ones, whose experts stand by slot (luffy.plan.outlook).
            E = router.config.num_experts
            self.register_buffer("outlook", torch.zeros(E, later_moe_layers, E, dtype=torch.int64))
        self.outlook: Tensor
        self._host_outlook: tuple[int, np.ndarray] = -1, np.zeros(0)
        mark_state(self, runtime.comm.mesh)
        self.residency = (
            None if runtime.residency is None else LayerResidency(runtime.residency, runtime.comm, self.experts)
        )

    @classmethod
    def build(cls, config: ModelConfig, runtime: Runtime, layer: int) -> MoELayer:
        """Layer `layer` of a model of `config`, its weights not yet initialised."""
        ep_size = runtime.comm.mesh.ep_size
        config.check_ranks(ep_size)
        shared = config.num_shared_experts * config.expert_hidden_size
        return cls(
            runtime,
            layer,
            router=Router(config.router, config.hidden_size),
            experts=GroupedExperts(config, config.router.num_experts // ep_size),
            shared_experts=FeedForward(config, shared) if shared else None,
            layer_of_moe=sum(config.is_moe_layer(i) for i in range(layer)),
            later_moe_layers=sum(config.is_moe_layer(i) for i in range(layer + 1, config.num_layers)),
            causal=config.causal,
        )

    @property
    def planner(self) -> Planner | None:
        """Who moves sequences after this layer; None where they stay."""
        return None if self.recipe.placement == "stay" else self.runtime.planner

    @property
    def settles(self) -> bool:
        """Whether sequences move behind this layer for all later ones."""
        return self.recipe.settles and self.recipe.placement != "stay"

    def prefetch(self, dtype: torch.dtype) -> Departed | None:
        """Begin to fetch experts that this rank is likely to want, if the recipe fetches any: call before attention."""
        if self.residency is None:
            return None
        return self.residency.prefetch(self.slot_of_expert, dtype, self.recipe.residency)

    def forward(self, batch: TokenBatch, norm: nn.Module) -> TokenBatch:
        return finish(self.stages(batch, norm))

    def stages(
        self,
        batch: TokenBatch,
        norm: Norm,
        predict_next: Predictor | None = None,
        departed: Departed | None = None,
    ) -> Stage[TokenBatch]:
        """`predict_next(hidden)` says which copies the next MoE layer is likely to want; see `Recipe.look_ahead`.
        departed: of `prefetch`."""
        rt, mesh = self.runtime, self.runtime.comm.mesh
        hidden, layout = batch.hidden, batch.layout  # [T, D]
        normed = norm(hidden)
        routing, stats = self.router(normed, layout)
        ids, weights = routing.topk_expert_ids, routing.topk_weights  # [T, K]

        experts, guests = ExpertMap(self.slot_of_expert, self.experts.num_local), None
        if self.residency is not None and self.recipe.residency != "static":
            rt.clock.switch("exchange")
            experts, guests = self.residency.settle(
                ids, self.slot_of_expert, hidden.dtype, departed, self.recipe.residency,
                moves=self.planner is not None,
            )  # fmt: skip
            rt.clock.switch("other")
        keys = copy_keys(ids, experts, mesh.ep_rank, self.recipe.copies)
        stats = replace(stats, rows=rows_at_favourite(keys, layout, mesh.ep_size).to(stats.rows.dtype))
        condensed, history, forecast = self._foresight(normed, ids, keys, experts, batch, predict_next)
        if rt.recorder.active:
            rt.recorder.note(layout, ids, None if forecast is None else forecast.topk_expert_ids)
        forecast = forecast if self.recipe.look_ahead else None

        hidden = boundary(hidden, rt.clock, "other", "exchange")
        sent = keys if condensed is None else only_sent(keys, condensed)
        wanted = self._what_planners_ask(sent, condensed, batch, forecast, ids)
        if experts.guests is not None and self.recipe.residency == "fetch" and wanted is None:
            copies, gathered = all_local(sent, ids, rt.comm), torch.zeros(0)
        else:
            copies, gathered = exchange_counts(sent, ids, rt.comm, wanted)
        plans: list[Planned] = []

        def plan() -> None:
            plans.append(self._plan(gathered.numpy(), batch, forecast is not None))

        # LSH-MoE's correction x - c is made with what the experts see, so that is what travels there.
        corrects = condensed is not None and condensed.scheme.compensate
        stream, norm_there = (normed, self.no_norm) if corrects else (hidden, norm)
        rows = None if condensed is None else rows_to_send(stream, copies, condensed)
        received = yield from dispatch(
            hidden, ids, weights, copies, self.recipe.copies, rows=rows, condensed=condensed,
            global_token=None if self.planner is None else layout.global_token,
            wire=self._codecs("dispatch"), meanwhile=None if self.planner is None else plan,
        )  # fmt: skip
        received = replace(received, rows=boundary(received.rows, rt.clock, "exchange", "experts"))
        partial = self._run_experts(received, copies.num_pairs, norm_there, experts, guests)
        if condensed is not None:
            stats = replace(stats, condensed=tally(condensed, received, partial).to(stats.condensed.dtype))
        migration = None
        if self.planner is not None:
            migration = plans[0].migration
            self.planner.confirm(plans[0], self.layer)

        if migration is not None:
            shared = self._shared_answers(received, condensed, weights, keys, experts)
            hidden = yield from self._rebuild(hidden, partial, received, migration, sent, shared, norm, experts)
            layout = migration.new
        else:
            partial, wire = boundary(partial, rt.clock, "experts", "exchange"), self._codecs("combine")
            if condensed is None:
                hidden = yield from combine(hidden, partial, copies, wire)
            else:
                correct = (normed, rows) if corrects and rows is not None else None
                hidden = yield from combine_condensed(hidden, partial, copies, condensed, weights, wire, correct)
            hidden = self._base(hidden, normed)
        hidden = boundary(hidden, rt.clock, "exchange", "other")
        return replace(
            batch, hidden=hidden, layout=layout, router_stats=(*batch.router_stats, stats), similarity=history
        )

    def _base(self, hidden: Tensor, normed: Tensor) -> Tensor:
        """What a token has besides its routed experts: its residual, and the experts that all tokens share."""
        return hidden if self.shared_experts is None else hidden + self.shared_experts(normed)

    def foresee(self, hidden: Tensor, norm: Norm) -> Forecast:
        """What this layer would choose for another layer's stream [T, D]; no gradient."""
        mesh = self.runtime.comm.mesh
        with torch.no_grad():
            ids = self.router.choose(norm(hidden))[2]
            experts = ExpertMap(self.slot_of_expert, self.experts.num_local)
            return Forecast(ids, copy_keys(ids, experts, mesh.ep_rank, self.recipe.copies))

    # ---------------------------------------------------------------- before anything is sent

    def _foresight(
        self,
        normed: Tensor,
        ids: Tensor,
        keys: CopyKeys,
        experts: ExpertMap,
        batch: TokenBatch,
        predict_next: Predictor | None,
    ) -> tuple[Condensed | None, History | None, Forecast | None]:
        """What is condensed, and what the next layer will want: on a GPU beside each other, on streams of their own."""
        rt = self.runtime

        def forecast() -> Forecast | None:
            return None if predict_next is None else predict_next(batch.hidden)

        wanted = rt.condense is not None and rt.condense.on and self.recipe.condense != "none"
        if not (wanted and self.training and torch.is_grad_enabled()):
            return None, None, forecast()

        def decide() -> tuple[Condensed, History | None]:
            assert rt.condense is not None
            return condense(
                rt.condense, self.layer_of_moe, normed.detach(), ids, keys, batch.layout, experts,
                rt.comm.mesh.ep_rank, causal=self.causal, by_sequence=self.recipe.moves,
                pairs=self.recipe.copies == "pairs", history=batch.similarity,
            )  # fmt: skip

        if not normed.is_cuda:
            rt.clock.switch("condense")
            condensed, history = decide()
            rt.clock.switch("other")
            return condensed, history, forecast()
        here, beside = torch.cuda.current_stream(), rt.side_stream()
        # What the host needs to launch it keeps the main stream idle, which counts as exposed; the forecast does not.
        rt.clock.switch("condense")
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            condensed, history = decide()
        rt.clock.switch("other")
        foreseen = forecast()
        rt.clock.switch("condense")
        here.wait_stream(beside)
        rt.clock.switch("other")
        return condensed, history, foreseen

    def _what_planners_ask(
        self, sent: CopyKeys, condensed: Condensed | None, batch: TokenBatch, forecast: Forecast | None, ids: Tensor
    ) -> Tensor | None:
        """int64 [S_max, n N]: copies by rank, then residuals that no row carries, then the next layer's copies; then,
        where sequences settle, tokens by expert, [S_max, E]."""
        if self.planner is None:
            return None
        N, layout = self.runtime.comm.mesh.ep_size, batch.layout
        num_rows = int(np.bincount(layout.table.home_rank, minlength=N).max())
        parts = [counts_per_sequence(sent, layout, N, num_rows)]
        if self._can_be_alone(condensed, batch.hidden):
            shared = None if condensed is None else condensed.shared
            parts.append(alone_per_sequence(sent, shared, layout, N, num_rows))
        if forecast is not None:
            parts.append(counts_per_sequence(forecast.keys, layout, N, num_rows))
        if self.settles:
            parts.append(choices_per_sequence(ids, layout, self.router.config.num_experts, num_rows))
        return torch.cat(parts, dim=1)

    def _sends_residuals(self, hidden: Tensor) -> bool:
        """Whether every token that moves sends its residual, since rows are rounded and must not carry it."""
        return self.recipe.wire_spec.rounds(hidden.element_size())

    def _can_be_alone(self, condensed: Condensed | None, hidden: Tensor) -> bool:
        """Whether a token may have no row that carries its residual, where rows carry any."""
        may = condensed is not None or self.router.config.capacity_factor is not None
        return may and not self._sends_residuals(hidden)

    def _codecs(self, direction: str) -> WireCodecs:
        return codecs_of(self.recipe.wire_spec, direction, self.runtime.draws, self.layer)

    def _plan(self, gathered: np.ndarray, batch: TokenBatch, looks_ahead: bool) -> Planned:
        rt = self.runtime
        assert self.planner is not None
        asked, N = by_table(gathered, batch.layout.table), rt.comm.mesh.ep_size
        next_counts = None
        if self.settles:
            asked, chosen = np.split(asked, [asked.shape[1] - self.router.config.num_experts], axis=1)
            next_counts = self._expected_rows(chosen, batch.layout.table.lengths)
        blocks = np.split(asked, asked.shape[1] // N, axis=1)
        counts, next_counts = blocks[0], blocks.pop() if looks_ahead else next_counts
        alone = blocks[1] if len(blocks) > 1 else None
        row_bytes = self.recipe.wire_spec.row_bytes(batch.hidden.shape[1], batch.hidden.element_size())
        return self.planner.plan(
            self.layer, batch.layout, counts, alone, next_counts, row_bytes, batch.padded, there_and_back=self.settles
        )

    def _expected_rows(self, chosen: np.ndarray, lengths: np.ndarray) -> np.ndarray | None:
        """int64 [S, N] for tokens by expert [S, E]: rows of all later layers."""
        if self._host_outlook[0] != self.outlook._version:  # a read-back, once a re-homing
            self._host_outlook = self.outlook._version, self.outlook.cpu().numpy()
        outlook, N = self._host_outlook[1], self.runtime.comm.mesh.ep_size
        if not outlook.shape[1]:
            return None
        slots = np.arange(outlook.shape[2]) * N // outlook.shape[2]
        return expected_rows(outlook, chosen, lengths, np.tile(slots, (outlook.shape[1], 1)), N)

    # ---------------------------------------------------------------- where rows arrived

    def _run_experts(
        self, received: Received, num_pairs: int, norm: Norm, experts: ExpertMap, guests: Tensor | None
    ) -> Tensor:
        """Partial sums [R, D] over the experts of this rank and its guests [F, W], one for each received row."""
        ep_rank = self.runtime.comm.mesh.ep_rank
        pairs = pairs_by_expert(received.expert_ids, experts, ep_rank, num_pairs, received.source_for(experts))

        def local_work(rows: Tensor, weights: Tensor) -> Tensor:
            answers = self.experts(norm(rows).index_select(0, pairs.row), pairs.num_tokens_per_expert, guests)
            return weighted_sum(answers, weights, pairs, rows.shape[0])

        if self.runtime.recompute and torch.is_grad_enabled():
            return checkpoint(local_work, received.rows, received.weights, use_reentrant=False)
        return local_work(received.rows, received.weights)

    def _shared_answers(
        self, received: Received, condensed: Condensed | None, weights: Tensor, keys: CopyKeys, experts: ExpertMap
    ) -> SharedAnswers | None:
        own = own_shared(received, experts, self.runtime.comm.mesh.ep_rank)
        return None if condensed is None or own is None else SharedAnswers(condensed, weights, keys.rank, own)

    def _rebuild(
        self,
        hidden: Tensor,
        partial: Tensor,
        received: Received,
        migration: Migration,
        sent: CopyKeys,
        shared: SharedAnswers | None,
        norm: Norm,
        experts: ExpertMap,
    ) -> Stage[Tensor]:
        """The stream at the new homes [T_new, D], each residual added by the one rank that carries it."""
        rt = self.runtime

        def base(rows: Tensor) -> Tensor:
            return self._base(rows, norm(rows))

        if self._sends_residuals(hidden):
            partial = boundary(partial, rt.clock, "experts", "exchange")
            return (yield from combine_at_new_home(
                hidden, partial, received, migration, rt.comm, base, shared=shared, wire=self._codecs("combine"),
                residual=residual_codec(self.recipe.wire_spec),
            ))  # fmt: skip
        own = None if shared is None else shared.own
        carried = carries_residual(received, migration, experts, rt.comm.mesh.ep_rank, own)
        if self.shared_experts is None:
            partial = partial + received.rows * carried.added[:, None]
        else:
            index = carried.added.nonzero().squeeze(1)  # a read-back: cheaper than the shared experts on every row
            rows = received.rows.index_select(0, index)
            partial = partial.index_add(0, index, base(rows))
        partial = boundary(partial, rt.clock, "experts", "exchange")
        condensed = None if shared is None else shared.condensed
        orphans = None
        if self._can_be_alone(condensed, hidden):
            orphans = orphan_tokens(sent, None if condensed is None else condensed.shared, migration)
        return (yield from combine_at_new_home(
            hidden, partial, received, migration, rt.comm, base, orphans, carried.apart, shared
        ))  # fmt: skip
