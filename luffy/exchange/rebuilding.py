"""Rebuilding dispatch: answers go to where a plan rebuilds their sequence, and the next layer runs there.

The paper's sequence migration (Algorithm 1 of arXiv 2411.15419) and NetMoE's: a plan for each layer, the same on every
rank, made while the rows are under way; how a sequence is put together at its new home: luffy.exchange.rebuild. Rows
travel as they are, since they carry residuals.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from luffy.comm.clock import boundary
from luffy.data.batch import TokenBatch
from luffy.errors import UserError
from luffy.exchange.condensing import Condensing
from luffy.exchange.copies import CopyKeys, ExpertMap
from luffy.exchange.direct import Direct
from luffy.exchange.dispatcher import Dispatcher, Forecast, Received, Tokens
from luffy.exchange.guests import Departed
from luffy.exchange.migrate import by_table, counts_per_sequence, residuals_per_sequence
from luffy.exchange.planning import Planned, Planner
from luffy.exchange.rebuild import (
    SharedAnswers,
    carries_residual,
    combine_at_new_home,
    own_shared,
    tokens_without_carrier,
)
from luffy.exchange.stage import Stage


class Rebuilding:
    """inner: `Direct` with a row a rank, or `Condensing` around that. may_drop: whether a token may have no row at all.
    looks_ahead: plans also weigh what the next layer is expected to choose."""

    def __init__(self, inner: Dispatcher, planner: Planner, layer: int, *, may_drop: bool, looks_ahead: bool) -> None:
        direct = inner.inner if isinstance(inner, Condensing) else inner
        if not isinstance(direct, Direct):
            raise UserError("--residency cannot be combined with a recipe that moves sequences; use --recipe luffy")
        if direct.per != "ranks":
            raise UserError("pairs do not migrate: a recipe that moves sequences sends a row a rank")
        if direct.transport.codes:
            raise UserError(
                "--wire cannot be combined with a recipe that moves sequences behind layers, whose rows carry "
                "residuals; use --recipe luffy, which seats sequences before the first layer"
            )
        if isinstance(inner, Condensing) and inner.state.scheme.compensate:
            raise UserError(
                f"--condense {inner.state.scheme.policy} with a correction cannot be combined with a recipe that moves "
                "sequences: a row is then not its token's own stream, which the sequence takes along; use "
                "--recipe vanilla_dedup"
            )
        self.inner, self.direct, self.planner, self.layer = inner, direct, planner, layer
        self.may_drop, self.looks_ahead = may_drop, looks_ahead

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None:
        return None

    def dispatch(self, tokens: Tokens) -> Stage[Received]:
        plans: list[Planned] = []
        forecast = tokens.forecast() if self.looks_ahead else None
        condenses = isinstance(self.inner, Condensing) and self.inner.state.on and tokens.condenses
        counts_residuals = condenses or self.may_drop

        def ask(keys: CopyKeys, shared: Tensor | None) -> Tensor:
            return self._ask(keys, shared, tokens, forecast, counts_residuals)

        def told(counts: np.ndarray) -> None:
            plans.append(self._plan(counts, tokens, counts_residuals, forecast is not None))

        received = yield from self.inner.dispatch(
            replace(tokens, forecast=lambda: forecast, ask=ask, told=told, names_tokens=True)
        )
        return replace(received, plan=plans[0])

    def _ask(
        self, keys: CopyKeys, shared: Tensor | None, tokens: Tokens, forecast: Forecast | None, counts_residuals: bool
    ) -> Tensor:
        """int64 [S_max, n N]: copies by rank, then residuals that no row carries, then the next layer's copies."""
        N, layout = self.direct.comm.mesh.ep_size, tokens.batch.layout
        num_rows = int(np.bincount(layout.table.home_rank, minlength=N).max())
        parts = [counts_per_sequence(keys, layout, N, num_rows)]
        if counts_residuals:
            parts.append(residuals_per_sequence(keys, shared, layout, N, num_rows))
        if forecast is not None:
            parts.append(counts_per_sequence(forecast.keys, layout, N, num_rows))
        return torch.cat(parts, dim=1)

    def _plan(self, gathered: np.ndarray, tokens: Tokens, counts_residuals: bool, looks_ahead: bool) -> Planned:
        hidden, layout = tokens.hidden, tokens.batch.layout
        asked = by_table(gathered, layout.table)
        counts, *more = np.split(asked, asked.shape[1] // self.direct.comm.mesh.ep_size, axis=1)
        next_counts = more.pop() if looks_ahead else None
        row_num_bytes = hidden.shape[1] * hidden.element_size()
        residuals = more[0] if counts_residuals else None
        return self.planner.plan(self.layer, layout, counts, residuals, next_counts, row_num_bytes, tokens.batch.padded)

    def answers(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[Tensor]:
        return self.inner.answers(tokens, received, partial)

    def combine(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[TokenBatch]:
        self.planner.confirm(received.plan, self.layer)
        migration = received.plan.migration
        if migration is None:
            return (yield from self.inner.combine(tokens, received, partial))
        comm, condensed = self.direct.comm, received.condensed
        ep_rank, experts = comm.mesh.ep_rank, received.experts

        own = own_shared(received, experts, ep_rank)
        shared = None
        if condensed is not None and own is not None and received.all_keys is not None:
            shared = SharedAnswers(condensed, tokens.topk_weights, received.all_keys.rank, own)
        carried = carries_residual(received, migration, experts, ep_rank, own)
        index = carried.added.nonzero().squeeze(1)  # a read-back: cheaper than shared experts on every row
        partial = partial.index_add(0, index, tokens.base(received.rows.index_select(0, index)).to(partial.dtype))
        partial = boundary(partial, self.direct.clock, "experts", "exchange")
        without_carrier = None
        if condensed is not None or self.may_drop:
            without_carrier = tokens_without_carrier(
                received.keys, None if condensed is None else condensed.shared, migration
            )
        out = yield from combine_at_new_home(
            tokens.hidden, partial, received, migration, comm, tokens.base, carried, without_carrier, shared
        )
        out = boundary(out, self.direct.clock, "exchange", "other")
        return replace(tokens.batch, hidden=out, layout=migration.new, similarity=received.history)
