"""Random routings, and one pass of rows through copies, dispatch, experts that do next to nothing, and combine."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.exchange import (
    Copies,
    ExpertMap,
    combine,
    copy_keys,
    dispatch,
    exchange_counts,
    finish,
    pairs_by_expert,
    weighted_sum,
)

PER = ("pairs", "ranks")


def random_routing(
    rank: int, num_tokens: int, num_experts: int, top_k: int, seed: int, drop: float = 0.0
) -> np.ndarray:
    """Expert ids int64 [T, K] of `rank`: distinct for a token, -1 for a share `drop` of the choices.

    Seeded by rank, so that any rank can work out what any other rank's routing is.
    """
    generator = np.random.default_rng([seed, rank])
    ids = np.argsort(generator.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    return np.where(generator.random(ids.shape) < drop, -1, ids)


def pass_through(
    hidden: Tensor,
    ids: Tensor,
    weights: Tensor,
    comm: Comm,
    experts: ExpertMap,
    per: str,
    work: Callable[[Tensor, Tensor], Tensor] = lambda rows, expert_ids: rows,
) -> tuple[Tensor, Copies]:
    """hidden + sum_k weights_k work(hidden, expert_k), by way of the ranks that own the experts.

    work: [P, D] rows and int64 [P] ids of their experts -> [P, D].
    """
    mesh = comm.mesh
    keys = copy_keys(ids, experts, mesh.ep_rank, per)
    copies, _, _ = exchange_counts(keys, ids, comm)
    received = finish(dispatch(hidden, ids, weights, copies, per))
    pairs = pairs_by_expert(received.expert_ids, experts, mesh.ep_rank, copies.num_pairs)
    answers = work(received.rows[pairs.row], received.expert_ids.flatten()[pairs.flat])
    partial = weighted_sum(answers, received.weights, pairs, received.rows.shape[0])
    return finish(combine(hidden, partial, copies)), copies


def expert_map(num_experts: int, ep_size: int, seed: int | None = None) -> ExpertMap:
    """Experts in order, or with a seed shuffled over the slots."""
    slots = np.arange(num_experts) if seed is None else np.random.default_rng(seed).permutation(num_experts)
    return ExpertMap(torch.from_numpy(slots), num_experts // ep_size)
