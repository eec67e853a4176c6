"""Auxiliary losses of all MoE layers, global over every token of the micro-batch.

balance = E * sum_e f_e P_e (Switch, arXiv 2101.03961): f_e the share of choices that fell on expert e (a count, no
gradient), P_e the mean probability. z = mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906).
locality = sum_s (L_s / T) H(p_s) - H(p), minus the mutual information of sequence and expert (see RouterConfig).
seat: see luffy.model.seat_loss.

The sum over ranks of what each rank returns is the global loss: every rank multiplies its *local* probability sums,
which carry gradient, by the *global* shares, which do not. So the gradient is exactly that of the global loss, and
summing gradients over ranks, as for the token loss, completes it. For -H(p) = sum_e p_e log p_e the factor is log p_e:
the derivative's other part, 1, meets probabilities that sum to a constant and vanishes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.config import RouterConfig
from luffy.exchange.condense import NUM_COUNTS
from luffy.model.router import RouterStats, entropy_of_sums


@dataclass(frozen=True)
class RouterTotals:
    """What the routers of a model did: sums over tokens of all ranks, one row a MoE layer, without gradient.

    Totals of micro-batches add up to those of a step, from which every share and mean below is then taken.
    assigned, probability: [layers, E]. z, sequence_entropy, dropped: [layers]. condensed: [layers, 2]. traffic:
    [layers, C * C], tokens by topic and block of experts chosen. All as in RouterStats. num_tokens: that they cover.
    """

    assigned: Tensor
    probability: Tensor
    z: Tensor
    sequence_entropy: Tensor
    dropped: Tensor
    condensed: Tensor
    traffic: Tensor
    num_tokens: int
    top_k: int

    def __add__(self, other: RouterTotals) -> RouterTotals:
        sums = {n: getattr(self, n) + getattr(other, n) for n in _SUMMED}
        return replace(self, **sums)

    @property
    def load(self) -> Tensor:
        """Share of choices that fell on each expert: [layers, E]."""
        return self.assigned / (max(self.num_tokens, 1) * self.top_k)

    @property
    def mean_probability(self) -> Tensor:
        """[layers, E]."""
        return self.probability / max(self.num_tokens, 1)

    @property
    def balance(self) -> Tensor:
        """E * sum_e f_e P_e, mean over layers: 1 when all experts are used evenly, []."""
        return self.load.shape[1] * (self.load * self.mean_probability).sum(1).mean()

    @property
    def mean_z(self) -> Tensor:
        """Mean of logsumexp^2: [layers]."""
        return self.z / max(self.num_tokens, 1)

    @property
    def dropped_share(self) -> Tensor:
        """Share of choices beyond capacity, mean over layers: []."""
        return self.dropped.mean() / (max(self.num_tokens, 1) * self.top_k)

    @property
    def mean_sequence_entropy(self) -> Tensor:
        """Mean H(p_s), in nats: [layers]."""
        return self.sequence_entropy / max(self.num_tokens, 1)

    @property
    def expert_entropy(self) -> Tensor:
        """H(p), in nats: [layers]."""
        return entropy_of_sums(self.mean_probability)

    @property
    def seat_traffic(self) -> Tensor:
        """Tokens by topic and by block of experts chosen: [layers, C, C]; [layers, 0, 1] where there are no topics."""
        return (
            self.traffic.unflatten(1, (math.isqrt(self.traffic.shape[1]), -1))
            if self.traffic.shape[1]
            else self.traffic[:, :, None]
        )

    def to_record(self, in_full: bool) -> dict[str, Any]:
        """The entries of a step's record (luffy.report.runs); in_full: those by layer and expert as well."""
        record: dict[str, Any] = {
            "balance": float(self.balance),
            "router_z": float(self.mean_z.mean()),
            "dropped": float(self.dropped_share),
            "locality": {
                "sequence_entropy": float(self.mean_sequence_entropy.mean()),
                "expert_entropy": float(self.expert_entropy.mean()),
            },
        }
        if in_full:
            record["expert_load"] = [[round(x, 5) for x in row] for row in self.load.tolist()]
        return record


_SUMMED = ("assigned", "probability", "z", "sequence_entropy", "dropped", "condensed", "traffic", "num_tokens")


@dataclass(frozen=True)
class AuxLoss:
    """`local`: this rank's part of the weighted losses, summed over layers ([], gradient).

    `totals`: of this micro-batch, for what is shown and steered.
    """

    local: Tensor
    totals: RouterTotals


def auxiliary_loss(
    stats: tuple[RouterStats, ...], config: RouterConfig, comm: Comm, num_tokens: int, seat_strength: float = 1.0
) -> AuxLoss | None:
    """Combine the layers' local sums. `num_tokens`: tokens of this micro-batch over all ranks, on the host.

    seat_strength: factor of `config.seat_loss` in this step.
    """
    if not stats:
        return None
    E, T = config.num_experts, max(num_tokens, 1)
    probability = torch.stack([s.probability_sum for s in stats])  # [layers, E], local
    z_local = torch.stack([s.z_sum for s in stats])  # [layers], local
    entropy_local = torch.stack([s.sequence_entropy for s in stats])  # [layers], local
    parts = [torch.stack([s.assigned for s in stats]), probability, z_local[:, None], entropy_local[:, None]]
    parts += [torch.stack([s.dropped for s in stats])[:, None]]
    parts += [torch.stack([s.condensed for s in stats]), torch.stack([s.seat_traffic for s in stats])]
    totals = comm.all_reduce(torch.cat([p.detach() for p in parts], dim=1))
    sizes = [E, E, 1, 1, 1, NUM_COUNTS, stats[0].seat_traffic.numel()]
    assigned, probability_total, z_total, entropy, dropped, condensed, traffic = totals.split(sizes, dim=1)
    counts = RouterTotals(
        assigned, probability_total, z_total.flatten(), entropy.flatten(), dropped.flatten(), condensed, traffic,
        num_tokens=num_tokens, top_k=config.top_k,
    )  # fmt: skip
    balance_local = E * (counts.load * probability).sum() / T
    local = config.balance_loss * balance_local + config.z_loss * z_local.sum() / T
    seat_loss = config.seat_loss * seat_strength if traffic.shape[1] else 0.0
    if config.locality_loss > 0 or seat_loss > 0:
        mean = counts.mean_probability
        log_probability = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()
        in_use = (log_probability * probability).sum()  # minus the entropy of the mean, as far as gradients go
        pull = config.locality_loss * entropy_local.sum() + (config.locality_loss + seat_loss) * in_use
        if seat_loss > 0:
            pull = pull + seat_loss * torch.stack([s.seat_pull for s in stats]).sum()
        local = local + pull / (T * len(stats))
    return AuxLoss(local, counts)
