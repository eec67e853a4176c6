"""Alone: one rank has all experts. Nothing is sent, nothing is copied, nobody is asked, and nothing is read back.

The experts work on the rows that the router saw, and add the residual within their sums.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luffy.comm.clock import PhaseClock, boundary
from luffy.data.batch import TokenBatch
from luffy.exchange.copies import ExpertMap
from luffy.exchange.dispatcher import Received, Tokens
from luffy.exchange.guests import Departed
from luffy.exchange.stage import Stage
from luffy.exchange.tally import RowTally


class Alone:
    """Takes the place of `Direct` at one rank, where no wrapper asks for copies. layer, tally: as there."""

    def __init__(self, clock: PhaseClock, layer: int, tally: RowTally) -> None:
        self.clock, self.layer, self.tally = clock, layer, tally

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None:
        return None

    def dispatch(self, tokens: Tokens) -> Stage[Received]:
        yield from ()
        self.tally.note(self.layer, np.array([[len(tokens.hidden)]]))
        residual = boundary(tokens.hidden, self.clock, "other", "experts") if tokens.residual else None
        nobody_asks: dict = {"copies": None, "keys": None}
        return Received(
            tokens.normed, tokens.topk_expert_ids, tokens.topk_weights, **nobody_asks, norm=lambda rows: rows,
            experts=tokens.experts, residual=residual,
        )  # fmt: skip

    def answers(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[Tensor]:
        raise NotImplementedError("wrappers that want answers apart stand around Direct")

    def combine(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[TokenBatch]:
        yield from ()
        return tokens.batch.with_hidden(boundary(tokens.base(partial, tokens.normed), self.clock, "experts", "other"))
