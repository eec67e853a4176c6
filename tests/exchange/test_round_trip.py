"""Dispatch, then combine, is the identity, on values and on gradients; what travels makes no difference."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from torch import Tensor

from luffy.comm import Comm, build_mesh
from luffy.exchange import copy_keys, exchange_counts
from luffy.testing import relative_error, run_ranks

from .routes import PER, expert_map, pass_through, random_routing

EXACT = 1e-13
# Tokens of each rank; zero is a rank without any.
TOKENS = ([5, 9, 3, 7], [0, 6, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0])


def leaves_of(rank: int, num_tokens: int, num_experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, 4], ids [T, K] with some choices dropped, and weights [T, K] that sum to one over what is left."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    hidden = torch.randn(num_tokens, 4, generator=generator, dtype=torch.float64)
    ids = torch.from_numpy(random_routing(rank, num_tokens, num_experts, top_k, seed, drop=0.2))
    ids[:, 0] = torch.where((ids < 0).all(1), 0, ids[:, 0])  # at least one choice each
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64) + 0.1
    weights = weights * (ids >= 0)
    return hidden.requires_grad_(), ids, (weights / weights.sum(1, keepdim=True)).requires_grad_()


def identity_job(rank: int) -> None:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world = comm.mesh.ep_size
    cases = itertools.product(TOKENS, (1, 2, 4), (4, 8), PER, (None, 1))
    for seed, (tokens, top_k, num_experts, per, shuffle) in enumerate(cases):
        experts = expert_map(num_experts, world, shuffle)
        hidden, ids, weights = leaves_of(rank, tokens[rank], num_experts, top_k, seed)
        out, _ = pass_through(hidden, ids, weights, comm, experts, per)
        assert relative_error(out, 2 * hidden) < EXACT  # the stream plus the identity
        upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        to_hidden, to_weights = torch.autograd.grad(out, (hidden, weights), upstream)
        assert relative_error(to_hidden, 2 * upstream) < EXACT
        # d out / d weight is the row itself, for each choice that some expert serves.
        expected = (upstream * hidden).sum(1, keepdim=True) * (ids >= 0)
        assert relative_error(to_weights, expected) < EXACT


@pytest.mark.parametrize("world", [1, 2, 4])
def test_identity_experts_give_the_stream_twice(world: int) -> None:
    run_ranks(identity_job, world)


def scaling_job(rank: int) -> None:
    """Expert e multiplies by (e + 2) and squares: ranks and pairs agree with the sum written out on the spot."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    for seed, (tokens, top_k) in enumerate(itertools.product(TOKENS, (1, 2, 4))):
        experts = expert_map(8, comm.mesh.ep_size, seed)
        hidden, ids, weights = leaves_of(rank, tokens[rank], 8, top_k, seed)
        factor = (ids.clamp_min(0) + 2.0)[:, :, None] * (ids >= 0)[:, :, None]  # [T, K, 1]
        expected = hidden + (weights[:, :, None] * factor * hidden[:, None, :] ** 2).sum(1)
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected_grads = torch.autograd.grad(expected, (hidden, weights), upstream)
        rows_sent = {}
        for per in PER:
            out, copies = pass_through(
                hidden, ids, weights, comm, experts, per, lambda rows, e: (e + 2.0)[:, None] * rows**2
            )
            assert relative_error(out, expected) < EXACT
            for got, want in zip(torch.autograd.grad(out, (hidden, weights), upstream), expected_grads, strict=True):
                assert relative_error(got, want) < EXACT
            rows_sent[per] = sum(copies.exchange.input_splits)
            # Each copy is one token's; by rank a token has at most one copy for each rank.
            assert copies.token.shape == copies.slot.shape == (rows_sent[per] + copies.num_local,)
        assert rows_sent["ranks"] <= rows_sent["pairs"]


@pytest.mark.parametrize("world", [1, 2, 4])
def test_pairs_and_ranks_compute_the_same(world: int) -> None:
    run_ranks(scaling_job, world)


def counts_job(rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int, np.ndarray]:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world = comm.mesh.ep_size
    ids = torch.from_numpy(random_routing(rank, 6, 8, 2, seed=3))
    keys = copy_keys(ids, expert_map(8, world), rank, "ranks")
    wishes = torch.arange(3 * (world + 1)).view(3, world + 1) + 100 * rank  # may be wider than there are ranks
    copies, gathered = exchange_counts(keys, ids, comm, wishes)
    exchange = copies.exchange
    return exchange.input_splits, exchange.output_splits, copies.num_local, copies.num_pairs, np.asarray(gathered)


def test_counts_of_all_ranks_reach_all_ranks() -> None:
    """Split sizes follow from the routing of all ranks; what the planner asks about rides along."""
    owners = [random_routing(rank, 6, 8, 2, seed=3) // 4 for rank in range(2)]  # [T, K] each
    for rank, (into, out_of, num_local, num_pairs, gathered) in enumerate(run_ranks(counts_job, 2)):
        other = 1 - rank
        assert into == tuple(int((owners[rank] == r).any(1).sum()) if r == other else 0 for r in range(2))
        assert out_of == tuple(int((owners[r] == rank).any(1).sum()) if r == other else 0 for r in range(2))
        assert num_local == int((owners[rank] == rank).any(1).sum())
        assert num_pairs == sum(int((owner == rank).sum()) for owner in owners)
        np.testing.assert_array_equal(gathered, np.arange(9).reshape(3, 3) + np.array([0, 100])[:, None, None])
