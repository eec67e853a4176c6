"""Hosting dispatch: ranks hold experts of others while a layer runs, so that fewer rows have to travel.

"fetch" (Janus, SIGCOMM 2023): every rank holds what its tokens chose. "shadow" (FasterMoE, PPoPP 2022): all ranks hold
popular experts. What is held, and how it gets there: luffy.exchange.residency.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from luffy.comm.clock import PhaseClock
from luffy.data.batch import TokenBatch
from luffy.errors import UserError
from luffy.exchange.copies import ExpertMap
from luffy.exchange.direct import Direct
from luffy.exchange.dispatcher import Dispatcher, Received, Tokens
from luffy.exchange.guests import Departed
from luffy.exchange.residency import LayerResidency
from luffy.exchange.stage import Stage


class Hosting:
    """inner: a `Direct` dispatcher."""

    def __init__(self, inner: Dispatcher, residency: LayerResidency, clock: PhaseClock) -> None:
        if not isinstance(inner, Direct):
            raise UserError("--residency cannot be combined with --condense; use --residency static")
        self.inner, self.residency, self.clock = inner, residency, clock

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None:
        return self.residency.prefetch(experts, dtype)

    def dispatch(self, tokens: Tokens) -> Stage[Received]:
        self.clock.switch("exchange")
        experts, guests = self.residency.settle(
            tokens.topk_expert_ids, tokens.experts, tokens.hidden.dtype, tokens.departed
        )
        self.clock.switch("other")
        received = yield from self.inner.dispatch(replace(tokens, experts=experts))
        return replace(received, guests=guests)

    def answers(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[Tensor]:
        return self.inner.answers(tokens, received, partial)

    def combine(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[TokenBatch]:
        return self.inner.combine(tokens, received, partial)
