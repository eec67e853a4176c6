"""Condensing dispatch: similar tokens share a row and its answer (what is similar: luffy.exchange.condense).

An answer that is shared comes back unweighted. Every copy that it serves adds it to its token with the token's own gate
weight, the one that was sent included. With correction a token also adds what the sent row differs by,
Y = E(c) + (x - c), as LSH-MoE does; what travels then is what the experts see, not the stream.

In training only: evaluation never condenses.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from luffy.comm.clock import boundary
from luffy.data.batch import TokenBatch
from luffy.errors import UserError
from luffy.exchange.condense import Condensed, CondenseState, History, condense, find_groups, only_sent
from luffy.exchange.copies import CopyKeys, ExpertMap, copy_keys
from luffy.exchange.direct import Direct
from luffy.exchange.dispatcher import Dispatcher, Forecast, Received, Tokens
from luffy.exchange.guests import Departed
from luffy.exchange.shared import rows_to_send, take_shared
from luffy.exchange.stage import Stage


class Condensing:
    """inner: a `Direct` dispatcher. layer: index among the model's MoE layers. by_sequence: whether only tokens of one
    sequence may share a row, which must be so where sequences move."""

    def __init__(self, inner: Dispatcher, state: CondenseState, layer: int, *, causal: bool, by_sequence: bool) -> None:
        if not isinstance(inner, Direct):
            raise UserError(
                f"--condense {state.scheme.policy} cannot be combined with --residency: who serves a choice would "
                "depend on what was condensed; use --residency static"
            )
        self.inner, self.state, self.layer, self.causal, self.by_sequence = inner, state, layer, causal, by_sequence
        self._streams: list[torch.cuda.Stream] = []

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None:
        return None

    def dispatch(self, tokens: Tokens) -> Stage[Received]:
        if not (self.state.on and tokens.condenses):
            return (yield from self.inner.dispatch(tokens))
        keys = copy_keys(tokens.topk_expert_ids, tokens.experts, self.inner.comm.mesh.ep_rank, self.inner.per)
        condensed, history, forecast = self._decide(tokens, keys)
        if self.inner.transport.codes:
            condensed = replace(condensed, shared=self._all_that_may_be_shared(tokens, keys) & condensed.sent)
        corrects = condensed.scheme.compensate
        received = yield from self.inner.dispatch(
            replace(
                tokens,
                forecast=lambda: forecast,
                keys=only_sent(keys, condensed),
                weights=tokens.topk_weights.masked_fill(condensed.shared, 1.0),
                shared=condensed.shared,
                rows=lambda copies: rows_to_send(tokens.normed if corrects else tokens.hidden, copies, condensed),
                norm_there=(lambda rows: rows) if corrects else None,
            )
        )
        return replace(received, condensed=condensed, all_keys=keys, history=history)

    def _decide(self, tokens: Tokens, keys: CopyKeys) -> tuple[Condensed, History | None, Forecast | None]:
        """What is condensed, what was found of pairs, the forecast. On a GPU the first two run on a side stream."""

        def decide() -> tuple[Condensed, History | None]:
            return condense(
                self.state, self.layer, tokens.normed.detach(), tokens.topk_expert_ids, keys, tokens.batch.layout,
                tokens.experts, self.inner.comm.mesh.ep_rank, causal=self.causal, by_sequence=self.by_sequence,
                pairs=self.inner.per == "pairs", history=tokens.batch.similarity,
            )  # fmt: skip

        clock = self.inner.clock
        clock.switch("condense")
        if not tokens.normed.is_cuda:
            condensed, history = decide()
            clock.switch("other")
            return condensed, history, tokens.forecast()
        here, beside = torch.cuda.current_stream(), self._side_stream(tokens.normed.device)
        # What the host needs to launch it keeps the main stream idle, which counts as exposed; the forecast does not.
        beside.wait_stream(here)
        with torch.cuda.stream(beside):
            condensed, history = decide()
        clock.switch("other")
        forecast = tokens.forecast()
        clock.switch("condense")
        here.wait_stream(beside)
        clock.switch("other")
        return condensed, history, forecast

    def _all_that_may_be_shared(self, tokens: Tokens, keys: CopyKeys) -> Tensor:
        """Copies that may stand for others, whether they do or not: bool [T, K].

        A weighted answer is rounded otherwise than an unweighted one. Were only those unweighted that do stand for
        another, then a token's answer would tell whether a later token is like it.
        """
        local = self.state.scheme.local or self.by_sequence
        E, rank = tokens.experts.slot_of_expert.shape[0], self.inner.comm.mesh.ep_rank
        group, _ = find_groups(
            tokens.topk_expert_ids, keys, tokens.batch.layout, E, rank, local=local, by_sequence=False,
            pairs=self.inner.per == "pairs",
        )  # fmt: skip
        return group < E

    def _side_stream(self, device: torch.device) -> torch.cuda.Stream:
        """It waits for the main stream before each use, so what it allocated is never reused while still being read."""
        if not self._streams:
            self._streams.append(torch.cuda.Stream(device))
        return self._streams[0]

    def answers(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[Tensor]:
        return self.inner.answers(tokens, received, partial)

    def combine(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[TokenBatch]:
        condensed, copies, hidden = received.condensed, received.copies, tokens.hidden
        if condensed is None:
            return (yield from self.inner.combine(tokens, received, partial))
        answers = yield from self.inner.answers(tokens, received, partial)  # [C, D]
        wide = torch.promote_types(hidden.dtype, torch.float32)
        shared = condensed.shared.flatten()[copies.flat]
        out = tokens.base(tokens.start, tokens.normed).to(wide)
        out = out.index_add(0, copies.token, answers.masked_fill(shared[:, None], 0).to(wide))
        takes, weights = condensed.takes_shared, tokens.topk_weights
        if condensed.scheme.compensate:
            # c is the row before it was coded: an answer E(c + e) to a rounded row is off by what the expert makes of
            # e, and a correction by x - (c + e) would write e itself into the stream beside it.
            assert received.sent is not None
            answers = answers.to(wide) - received.sent.to(wide)
            out = out + (weights * takes).sum(1, keepdim=True).to(wide) * tokens.normed.to(wide)
        out = take_shared(out, answers, copies.places(takes.numel())[condensed.leader], takes, weights)
        out = boundary(out.to(hidden.dtype), self.inner.clock, "exchange", "other")
        return replace(tokens.batch.with_hidden(out), similarity=received.history)
