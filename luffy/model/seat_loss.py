"""The seat loss: routers learn to choose experts that stand where a token's sequence is seated.

Sequences have topics, known before the first layer (luffy.seats.topic); the slots of experts are cut into as many
equal blocks, and block c is where topic c is at home: a rank, a part of one, or several. The loss pulls a token's
router probabilities to its block. With m_c the sum of its probabilities p over block c, h its topic and K the number
of experts chosen, a token pays, by `seat_loss_form`,

    mass   1 - m_h
    rows   sum over c != h of 1 - exp(-K m_c): about the rows that it sends, nothing more for a block it uses anyway

and the loss is the mean over all tokens of the micro-batch on all ranks, less the entropy of the mean probabilities
(all experts stay in use), the mean over MoE layers. Nothing of the seat enters the forward pass, so no token learns
its future, and what comes out is an ordinary model. The same sums count the traffic of C virtual ranks.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from luffy.config import RouterConfig
from luffy.data.batch import Layout


def seat_stats(
    probabilities: Tensor, chosen: Tensor, layout: Layout, slot_of_expert: Tensor, config: RouterConfig
) -> tuple[Tensor, Tensor]:
    """probabilities [T, E], chosen expert ids [T, K] -> what this rank's tokens pay, summed, [] (gradient); and
    traffic [C * C]: tokens of topic c (rows) that chose experts of block d (columns). 0 and [0] without topics."""
    C = layout.table.num_topics
    if not C:
        return probabilities.new_zeros(()), probabilities.new_zeros(0)
    E, topic = probabilities.shape[1], layout.topic_of_token
    block = slot_of_expert * C // E  # [E]
    with torch.no_grad():
        hit = probabilities.new_zeros(len(topic), C).scatter_(1, block[chosen], 1.0)
        traffic = probabilities.new_zeros(C, C).index_add_(0, topic, hit).flatten()
    if config.seat_loss == 0:
        return probabilities.new_zeros(()), traffic
    home = torch.nn.functional.one_hot(topic, C).to(probabilities.dtype)  # [T, C]
    mass = probabilities @ torch.nn.functional.one_hot(block, C).to(probabilities.dtype)  # [T, C]
    return _FORMS[config.seat_loss_form](mass, home, config.top_k).sum(), traffic


def _mass(mass: Tensor, home: Tensor, top_k: int) -> Tensor:
    return 1 - (mass * home).sum(1)


def _rows(mass: Tensor, home: Tensor, top_k: int) -> Tensor:
    return ((1 - home) * (1 - (-top_k * mass).exp())).sum(1)


_FORMS: dict[str, Callable[[Tensor, Tensor, int], Tensor]] = {"mass": _mass, "rows": _rows}
