"""Auxiliary losses of all MoE layers, global over every token of the micro-batch.

balance = E * sum_e f_e P_e (Switch, arXiv 2101.03961): f_e the share of choices that fell on expert e (a count, no
gradient), P_e the mean probability. z = mean of logsumexp(logits)^2 (ST-MoE, arXiv 2202.08906).

The sum over ranks of what each rank returns is the global loss: every rank multiplies its *local* probability sums,
which carry gradient, by the *global* shares, which do not. So the gradient is exactly that of the global loss, and
summing gradients over ranks, as for the token loss, completes it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.config import RouterConfig
from luffy.model.router import RouterStats


@dataclass(frozen=True)
class AuxLoss:
    """`local`: this rank's part of balance_loss * balance + z_loss * z, summed over layers ([], gradient).

    For the metrics, without gradient and global: `balance` [] (mean over layers, unweighted; 1 when all experts are
    used evenly), `z` [layers], `load` [layers, E] (share of choices), `dropped` [] (share of choices).
    """

    local: Tensor
    balance: Tensor
    z: Tensor
    load: Tensor
    dropped: Tensor


def auxiliary_loss(stats: tuple[RouterStats, ...], config: RouterConfig, comm: Comm, num_tokens: int) -> AuxLoss | None:
    """Combine the layers' local sums. `num_tokens`: tokens of this micro-batch over all ranks, on the host."""
    if not stats:
        return None
    E, T = config.num_experts, max(num_tokens, 1)
    probability = torch.stack([s.probability_sum for s in stats])  # [layers, E], local
    z_local = torch.stack([s.z_sum for s in stats])  # [layers], local
    parts = [torch.stack([s.assigned for s in stats]), probability, z_local[:, None]]
    parts.append(torch.stack([s.dropped for s in stats])[:, None])
    totals = comm.all_reduce(torch.cat([p.detach() for p in parts], dim=1))
    assigned, probability_total, z_total, dropped = totals.split([E, E, 1, 1], dim=1)
    load = assigned / (T * config.top_k)  # [layers, E]
    balance_local = E * (load * probability).sum() / T
    local = config.balance_loss * balance_local + config.z_loss * z_local.sum() / T
    return AuxLoss(
        local=local,
        balance=E * (load * probability_total).sum(1).mean() / T,
        z=z_total.flatten() / T,
        load=load,
        dropped=dropped.mean() / (T * config.top_k),
    )
