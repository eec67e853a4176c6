"""What a MoE layer asks of a dispatcher: tokens to the ranks of their experts, and their answers back.

    received = yield from dispatcher.dispatch(tokens)            rows at the experts' ranks
    batch = yield from dispatcher.combine(tokens, received, partial)

`Direct` sends rows and brings back partial sums. `Condensing`, `Hosting` and `Rebuilding` wrap another dispatcher and
change one thing each; each refuses, when it is made, an inner one that it cannot serve. luffy.compose puts them
together.

A dispatcher has no parameters and keeps nothing from one call to the next that a result depends on: micro-batches may
take turns (luffy.exchange.stage). What `combine` must know of its `dispatch` travels in `Received`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor

from luffy.data.batch import TokenBatch
from luffy.exchange.condense import Condensed
from luffy.exchange.copies import Copies, CopyKeys, ExpertMap
from luffy.exchange.guests import Departed
from luffy.exchange.stage import Stage

Norm = Callable[[Tensor], Tensor]  # rows of the stream to what router and experts see


class Base(Protocol):
    """Rows of the stream [n, D], and normed ones where they are at hand, to all but the routed experts' part."""

    def __call__(self, rows: Tensor, normed: Tensor | None = None) -> Tensor: ...


class Forecast(NamedTuple):
    """What the next MoE layer is expected to choose: ids int64 [T, K], and the copies that it would make of them."""

    topk_expert_ids: Tensor
    keys: CopyKeys


@dataclass(frozen=True)
class Tokens:
    """This rank's tokens before a MoE layer, what their router chose, and how wrappers want them sent.

    batch: the residual stream [T, D] and its layout. normed [T, D]: what router and experts see. topk_expert_ids int64
    [T, K], -1 where dropped; topk_weights [T, K]. experts: where experts live. norm: applied where rows arrive.
    base(rows): what a token has besides its routed experts, its residual and the shared experts. residual: whether the
    layer adds the stream to the experts' answers; a model that does so itself wants them alone. condenses:
    whether similar tokens may share a row (in training only). departed: experts of other ranks, on their way.
    forecast: the next layer's choices, if anybody asks for them.

    Set by wrappers: keys, the copies to send (None: one for each choice or rank); weights, those sent along; shared,
    bool [T, K], choices answered with weight one; rows(copies), what to send in place of the stream [C, D]; norm_there,
    what the receiver applies in place of `norm`; ask(keys, shared), counts that ranks gather beside their split sizes,
    int64 [S_max, n]; told(counts of all ranks [N, S_max, n]), host work while the rows travel; names_tokens: global ids
    travel along.
    """

    batch: TokenBatch
    normed: Tensor
    topk_expert_ids: Tensor
    topk_weights: Tensor
    experts: ExpertMap
    norm: Norm
    base: Base
    residual: bool = True
    condenses: bool = False
    departed: Departed | None = None
    forecast: Callable[[], Forecast | None] = lambda: None
    keys: CopyKeys | None = None
    weights: Tensor | None = None
    shared: Tensor | None = None
    rows: Callable[[Copies], Tensor] | None = None
    norm_there: Norm | None = None
    ask: Callable[[CopyKeys, Tensor | None], Tensor] | None = None
    told: Callable[[np.ndarray], None] | None = None
    names_tokens: bool = False

    @property
    def hidden(self) -> Tensor:
        return self.batch.hidden

    @property
    def start(self) -> Tensor:
        """[T, D] that answers are added to."""
        return self.hidden if self.residual else torch.zeros_like(self.hidden)


@dataclass(frozen=True)
class Received:
    """What the experts of this rank get to see: own rows first, then by source rank.

    rows: [R, D], of the stream unless a wrapper sent others. expert_ids: int64 [R, K], -1 for dropped choices; ids of
    experts elsewhere are among them. weights: [R, K]. Where a copy is a pair, K is 1 here. copies: this rank's own,
    which know how many came from where. keys: those of the copies that were sent. norm: to apply to the rows.
    experts: where experts live. guests [F, W]: weights of experts of other ranks that are held here, if any.
    residual [R, D]: what to add to the experts' partial sums, each then rounded once; None for nothing.

    Set where sequences move: global_token int64 [R], plan. Set where tokens are condensed: shared, bool [R, K], choices
    answered with weight one; condensed; all_keys, with the copies that were condensed; sent [C, D], the rows that
    travelled; history, for the next layer.
    """

    rows: Tensor
    expert_ids: Tensor
    weights: Tensor
    copies: Copies
    keys: CopyKeys
    norm: Norm
    experts: ExpertMap
    guests: Tensor | None = None
    residual: Tensor | None = None
    global_token: Tensor | None = None
    plan: Any = None
    shared: Tensor | None = None
    condensed: Condensed | None = None
    all_keys: CopyKeys | None = None
    sent: Tensor | None = None
    history: Any = None

    @property
    def num_pairs(self) -> int | None:
        """(row, expert) pairs, where ranks told each other."""
        return None if self.copies is None else self.copies.num_pairs

    def source_for(self, experts: ExpertMap) -> Tensor | None:
        """The rank that each row came from, int64 [R], where who serves a choice depends on it; else None."""
        if experts.guests is None:
            return None
        mesh, splits = self.copies.exchange.comm.mesh, self.copies.exchange.output_splits
        ranks = torch.tensor([mesh.ep_rank, *range(mesh.ep_size)])
        counts = torch.tensor([self.copies.num_local, *splits])
        return torch.repeat_interleave(ranks, counts).to(self.rows.device)


class Dispatcher(Protocol):
    """See the module's docstring. `prefetch` is called before attention, with the dtype that experts compute in."""

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None: ...

    def dispatch(self, tokens: Tokens) -> Stage[Received]:
        """Rows of this rank's tokens to the ranks of their experts."""
        ...

    def answers(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[Tensor]:
        """partial [R, D] of this rank's experts -> the answers to this rank's own copies, [C, D], in their order."""
        ...

    def combine(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[TokenBatch]:
        """partial [R, D] -> the batch with its new stream."""
        ...
