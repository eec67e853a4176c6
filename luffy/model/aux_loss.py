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
from dataclasses import dataclass

import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.config import RouterConfig
from luffy.exchange.audit import NUM_COUNTS
from luffy.model.router import RouterStats, entropy_of_sums


@dataclass(frozen=True)
class AuxLoss:
    """`local`: this rank's part of the weighted losses, summed over layers ([], gradient).

    For the metrics, without gradient and global: `balance` [] (mean over layers, unweighted; 1 when all experts are
    used evenly), `z` [layers], `load` [layers, E] (share of choices), `dropped` [] (share of choices).
    `sequence_entropy`, `expert_entropy` [layers]: mean H(p_s) and H(p) in nats. `favourite_share` [layers]: of a
    sequence's rows, the share at the rank that holds most of them, mean over rows. `condensed` [layers, 5]: see
    luffy.exchange.audit; zeros where nothing is condensed. `seat_traffic` [layers, C, C]: share of tokens by topic and
    by block of experts chosen; [layers, 0, 0] where sequences have no topics.
    """

    local: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor
    dropped: Tensor
    sequence_entropy: Tensor
    expert_entropy: Tensor
    favourite_share: Tensor
    condensed: Tensor
    seat_traffic: Tensor


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
    parts += [torch.stack([s.dropped for s in stats])[:, None], torch.stack([s.rows for s in stats])]
    parts += [torch.stack([s.condensed for s in stats]), torch.stack([s.seat_traffic for s in stats])]
    totals = comm.all_reduce(torch.cat([p.detach() for p in parts], dim=1))
    sizes = [E, E, 1, 1, 1, 2, NUM_COUNTS, stats[0].seat_traffic.numel()]
    assigned, probability_total, z_total, entropy, dropped, rows, condensed, traffic = totals.split(sizes, dim=1)
    load = assigned / (T * config.top_k)  # [layers, E]
    balance_local = E * (load * probability).sum() / T
    local = config.balance_loss * balance_local + config.z_loss * z_local.sum() / T
    mean_probability = probability_total / T
    seat_loss = config.seat_loss * seat_strength if traffic.shape[1] else 0.0
    if config.locality_loss > 0 or seat_loss > 0:
        log_probability = mean_probability.clamp_min(torch.finfo(mean_probability.dtype).tiny).log()
        in_use = (log_probability * probability).sum()  # minus the entropy of the mean, as far as gradients go
        pull = config.locality_loss * entropy_local.sum() + (config.locality_loss + seat_loss) * in_use
        if seat_loss > 0:
            pull = pull + seat_loss * torch.stack([s.seat_pull for s in stats]).sum()
        local = local + pull / (T * len(stats))
    return AuxLoss(
        local=local,
        balance=E * (load * probability_total).sum(1).mean() / T,
        z=z_total.flatten() / T,
        load=load,
        dropped=dropped.mean() / (T * config.top_k),
        sequence_entropy=entropy.flatten() / T,
        expert_entropy=entropy_of_sums(mean_probability),
        favourite_share=rows[:, 1] / rows[:, 0].clamp_min(1),
        condensed=condensed,
        seat_traffic=(traffic / T).view(len(stats), *[math.isqrt(traffic.shape[1])] * 2),
    )
