"""The router: which experts a token goes to, with what weight, and what that says to the auxiliary losses.

Scores are computed in float32 at least. The auxiliary losses are *global*: their statistics run over all tokens of
a micro-batch on all ranks, so that they do not depend on which rank holds a sequence (a per-rank balance loss would
fight sequence migration, which gathers alike sequences on purpose). Each rank therefore keeps local sums; one small
all-reduce after the last layer turns the sums of all layers into the losses (`luffy.model.aux_loss`). A micro-batch
cannot know what later ones will choose; what is shown of a step and the loss-free bias see them all.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn

from luffy.config import RouterConfig
from luffy.data.batch import Layout
from luffy.exchange.condense import NUM_COUNTS
from luffy.kernels.router import route, serves
from luffy.model.seat_loss import seat_stats


@dataclass(frozen=True)
class Routing:
    """Per token of this rank: the chosen experts and their weights.

    topk_expert_ids: int64 [T, K]; -1 where capacity dropped the choice.
    topk_weights: [T, K] in float32 or float64; 0 where dropped.
    """

    topk_expert_ids: Tensor
    topk_weights: Tensor


@dataclass(frozen=True)
class RouterStats:
    """Local sums of one layer over this rank's tokens, each computed when it is first asked for; those that carry
    gradient are marked. Of choices [T, K], made from logits and scores [T, E]; dropped_choices [], if any may be.

    probability_sum [E] (gradient): normalised scores. assigned [E]: choices. z_sum [] (gradient): sum of
    logsumexp^2. sequence_entropy [] (gradient): sum over sequences of length * H(mean probabilities), in nats.
    dropped []: choices beyond capacity. condensed [2]: see luffy.exchange.condense (filled in by the layer).
    seat_pull [] (gradient), seat_traffic [C * C]: see luffy.model.seat_loss; 0 and [0] where sequences have no topics.
    """

    logits: Tensor
    scores: Tensor
    topk_expert_ids: Tensor
    layout: Layout
    config: RouterConfig
    slot_of_expert: Tensor
    dropped_choices: Tensor | None = None
    condensed_counts: Tensor | None = None

    @cached_property
    def _probabilities(self) -> Tensor:
        return self.scores if self.config.score == "softmax" else self.scores / self.scores.sum(-1, keepdim=True)

    @cached_property
    def _by_sequence(self) -> Tensor:
        return sequence_sums(self._probabilities, self.layout)  # [S, E]

    @cached_property
    def probability_sum(self) -> Tensor:
        return self._by_sequence.sum(0)

    @cached_property
    def assigned(self) -> Tensor:
        chosen = self.topk_expert_ids.flatten()
        ones = self.scores.new_ones(chosen.numel())
        return self.scores.new_zeros(self.scores.shape[1]).index_add_(0, chosen, ones)

    @cached_property
    def z_sum(self) -> Tensor:
        return _SquaredLogNormaliser.apply(self.logits)

    @cached_property
    def sequence_entropy(self) -> Tensor:
        return entropy_of_sums(self._by_sequence).sum()

    @cached_property
    def dropped(self) -> Tensor:
        return self.scores.new_zeros(()) if self.dropped_choices is None else self.dropped_choices

    @cached_property
    def condensed(self) -> Tensor:
        counts = self.condensed_counts
        return self.scores.new_zeros(NUM_COUNTS) if counts is None else counts.to(self.scores.dtype)

    @cached_property
    def _seats(self) -> tuple[Tensor, Tensor]:
        return seat_stats(self._probabilities, self.topk_expert_ids, self.layout, self.slot_of_expert, self.config)

    @property
    def seat_pull(self) -> Tensor:
        return self._seats[0]

    @property
    def seat_traffic(self) -> Tensor:
        return self._seats[1]


def wide(dtype: torch.dtype) -> torch.dtype:
    """The type that a router computes in, for weights or rows of `dtype`: float32 at least."""
    return torch.promote_types(dtype, torch.float32)


class RouterBase(nn.Module):
    """What a MoELayer asks of a router: normed rows [T, D] -> Routing, RouterStats.

    Logits, scores and weights are in float32 at least, under autocast too, whatever the model's dtype is; and so are
    its buffers: a step of 0.001 is lost on a bias of 1 in bfloat16.
    """

    config: RouterConfig
    chosen: Tensor | None = None  # see `take_chosen`

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> RouterBase:
        """As every module's `to`, `bfloat16` and so on, but buffers of floats stay in float32 at least."""
        owned = [(m, n, b) for m in self.modules() for n, b in m._buffers.items() if b is not None]
        super()._apply(fn, recurse)
        for module, name, before in owned:
            after = module._buffers[name]
            if after is not None and after.is_floating_point() and after.dtype != wide(after.dtype):
                module._buffers[name] = before.to(after.device, wide(after.dtype))
        return self

    def note(self, topk_expert_ids: Tensor) -> None:
        """Count choices [T, K] of a training pass, until they are taken."""
        if self.config.bias_update_rate > 0 and self.training and torch.is_grad_enabled():
            E = self.config.num_experts
            ones = torch.ones_like(topk_expert_ids.flatten())
            counts = ones.new_zeros(E).index_add_(0, topk_expert_ids.flatten(), ones)
            self.chosen = counts if self.chosen is None else self.chosen + counts

    def take_chosen(self) -> Tensor:
        """How often this rank's tokens chose each expert since this was last asked: int64 [E]."""
        taken, self.chosen = self.chosen, None
        if taken is None:
            device = next(self.parameters()).device
            taken = torch.zeros(self.config.num_experts, dtype=torch.int64, device=device)
        return taken

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> logits [T, E], scores [T, E] and the ids of the k chosen [T, K]."""
        raise NotImplementedError

    def forward(self, x: Tensor, layout: Layout, slot_of_expert: Tensor) -> tuple[Routing, RouterStats]:
        """slot_of_expert: int64 [E], by which experts belong to topics."""
        raise NotImplementedError

    def raise_bias(self, by: Tensor) -> None:
        """Add `by` [E] to what is added to the scores for the choice only (loss-free balancing)."""
        raise NotImplementedError


class Router(RouterBase):
    """Linear scores, top-k choice."""

    def __init__(self, config: RouterConfig, hidden_size: int) -> None:
        super().__init__()
        self.config = config
        self.weight = nn.Parameter(torch.empty(config.num_experts, hidden_size))
        # Loss-free balancing: added to the scores for the choice only, moved by the trainer after each step.
        self.register_buffer("choice_bias", torch.zeros(config.num_experts))
        self.choice_bias: Tensor

    def choose(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[T, D] -> logits [T, E], scores [T, E] and the ids of the k best [T, K]."""
        dtype = wide(torch.promote_types(x.dtype, self.weight.dtype))
        with torch.autocast(x.device.type, enabled=False):
            logits = x.to(dtype) @ self.weight.to(dtype).t()
        scores = logits.softmax(-1) if self.config.score == "softmax" else logits.sigmoid()
        choice = scores + self.choice_bias.to(scores.dtype) if self.config.bias_update_rate > 0 else scores
        if self.config.num_groups:
            choice = within_best_groups(choice, self.config)
        return logits, scores, choice.topk(self.config.top_k, dim=-1).indices

    def raise_bias(self, by: Tensor) -> None:
        self.choice_bias.add_(by.to(self.choice_bias.dtype))

    def forward(self, x: Tensor, layout: Layout, slot_of_expert: Tensor) -> tuple[Routing, RouterStats]:
        cfg = self.config
        if serves(x, self.weight) and not cfg.num_groups:
            bias = self.choice_bias if cfg.bias_update_rate > 0 else None
            logits, scores, ids, weights = route(x, self.weight, bias, cfg.top_k, cfg.score, cfg.normalize_topk)
        else:
            logits, scores, ids = self.choose(x)
            weights = scores.gather(-1, ids)
            if cfg.normalize_topk:
                weights = weights / weights.sum(-1, keepdim=True).clamp_min(1e-20)
        chosen, dropped = ids, None
        self.note(ids)
        if cfg.capacity_factor is not None:
            keep = within_capacity(ids, layout, cfg.num_experts, cfg.capacity_factor)
            dropped = (~keep).sum().to(scores.dtype)
            ids, weights = ids.masked_fill(~keep, -1), weights * keep
        return Routing(ids, weights), RouterStats(logits, scores, chosen, layout, cfg, slot_of_expert, dropped)


def within_best_groups(choice: Tensor, config: RouterConfig) -> Tensor:
    """[T, E] with -inf for experts outside of each token's best groups (see RouterConfig)."""
    grouped = choice.detach().unflatten(-1, (config.num_groups, -1))  # [T, G, E / G]
    best = grouped.topk(min(max(1, config.top_k // config.top_k_groups), grouped.shape[-1]), dim=-1).values.sum(-1)
    kept = torch.zeros_like(best, dtype=torch.bool).scatter_(1, best.topk(config.top_k_groups, dim=-1).indices, True)
    return grouped.masked_fill(~kept[..., None], -torch.inf).flatten(1)


def sequence_sums(probabilities: Tensor, layout: Layout) -> Tensor:
    """Sum over each local sequence's tokens: [T, E] -> [S_local, E]."""
    sums = probabilities.new_zeros(layout.num_sequences, probabilities.shape[1])
    return sums.index_add(0, layout.sequence_of_token, probabilities)


def entropy_of_sums(sums: Tensor) -> Tensor:
    """n * H(sums / n) in nats, n being the sum over the last axis: [.., E] -> [..]; 0 where n is 0."""
    return _EntropyOfSums.apply(sums)


class _SquaredLogNormaliser(torch.autograd.Function):
    """Sum over tokens of logsumexp(logits)^2, [T, E] -> []; its derivative is 2 logsumexp(logits) softmax(logits)."""

    @staticmethod
    def forward(ctx, logits: Tensor) -> Tensor:
        log_normaliser = logits[:, 0] - logits.log_softmax(-1)[:, 0]  # two kernels where logsumexp takes nine
        ctx.save_for_backward(logits, log_normaliser)
        return log_normaliser.square().sum()

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        logits, log_normaliser = ctx.saved_tensors
        return logits.softmax(-1) * (log_normaliser * (2 * grad))[:, None]


class _EntropyOfSums(torch.autograd.Function):
    """n log n - sum_e x_e log x_e, whose derivative is log(n / x_e); taken as 0 where x_e is 0.

    A function of its own, since autograd makes thirty small kernels a layer of what are five.
    """

    @staticmethod
    def forward(ctx, sums: Tensor) -> Tensor:
        total = sums.sum(-1)
        ctx.save_for_backward(sums, total)
        return torch.xlogy(total, total) + torch.special.entr(sums).sum(-1)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        sums, total = ctx.saved_tensors
        slope = (total[..., None] / sums).log_()
        return slope.masked_fill_(sums <= 0, 0.0) * grad[..., None]


def within_capacity(ids: Tensor, layout: Layout, num_experts: int, factor: float) -> Tensor:
    """True where a choice fits its expert's capacity for its sequence: bool [T, K].

    Capacity is ceil(factor * length * K / E), filled in token order: a later token never displaces an earlier one
    (no leak from the future), and neither placement nor the other sequences matter.
    """
    T, K = ids.shape
    sequence = layout.sequence_of_token
    lengths = torch.tensor(layout.lengths, device=ids.device, dtype=torch.float64)
    capacity = (factor * lengths * K / num_experts).ceil().to(torch.int64)  # [S]
    group = (sequence[:, None] * num_experts + ids).flatten()  # one group per (sequence, expert)
    order = torch.argsort(group, stable=True)
    grouped = group[order]
    index = torch.arange(T * K, device=ids.device)
    first = torch.ones_like(grouped, dtype=torch.bool)
    first[1:] = grouped[1:] != grouped[:-1]
    start = torch.where(first, index, 0).cummax(0).values  # where each group begins in the sorted order
    place = torch.empty_like(index)
    place[order] = index - start
    return place.unflatten(0, (T, K)) < capacity[sequence][:, None]
