"""Dispatch, then combine, is the identity, on values and on gradients, whatever stands around the rows."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from luffy.comm import Comm, build_mesh
from luffy.comm.clock import PhaseClock
from luffy.condensation import Condensation
from luffy.data.batch import TokenBatch
from luffy.exchange.condense import CondenseState
from luffy.exchange.condensing import Condensing
from luffy.exchange.copies import ExpertMap, copy_keys, exchange_counts
from luffy.exchange.dispatcher import Dispatcher
from luffy.exchange.hosting import Hosting
from luffy.exchange.planning import Planner
from luffy.exchange.rebuilding import Rebuilding
from luffy.exchange.residency import LayerResidency, ResidencyState
from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology
from luffy.testing import relative_error, run_ranks

from .routes import PER, Scales, batch_of, direct, expert_map, pass_through, random_routing

EXACT = 1e-13
# Sequences of each rank, by their lengths; an empty list is a rank without any token.
LENGTHS = ([[2, 3, 1], [2, 3, 2], [3], [1, 4]], [[], [4, 2], [], [1]], [[1, 1], [1, 1], [1], [1]], [[], [], [], []])
ROUTINGS = ((1, 4, None), (2, 8, 1), (4, 4, 1))  # choices a token, experts, seed of their places
ALIKE_TO_NOBODY = 2.0  # above any cosine


def leaves_of(rank: int, num_tokens: int, num_experts: int, top_k: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Rows [T, 4], ids [T, K] with some choices dropped, and weights [T, K] that sum to one over what is left."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    hidden = torch.randn(num_tokens, 4, generator=generator, dtype=torch.float64)
    ids = torch.from_numpy(random_routing(rank, num_tokens, num_experts, top_k, seed, drop=0.2))
    ids[:, 0] = torch.where((ids < 0).all(1), 0, ids[:, 0])  # at least one choice each
    weights = torch.rand(num_tokens, top_k, generator=generator, dtype=torch.float64) + 0.1
    weights = weights * (ids >= 0)
    return hidden.requires_grad_(), ids, (weights / weights.sum(1, keepdim=True)).requires_grad_()


def dispatchers(comm: Comm, scales: Scales, layer: int) -> Iterator[tuple[str, Dispatcher]]:
    """Each of them, around each inner one that it can serve. layer: random plans follow from it."""
    N, clock = comm.mesh.ep_size, PhaseClock(comm.mesh.device)

    def condensing(per: str, *, moves: bool = False, **scheme: object) -> Condensing:
        state = CondenseState(Condensation("static", ALIKE_TO_NOBODY, **scheme), [ALIKE_TO_NOBODY])  # type: ignore[arg-type]
        return Condensing(direct(comm, per), state, 0, causal=True, by_sequence=moves)

    for per in PER:
        yield f"direct {per}", direct(comm, per)
        yield f"condensing {per}", condensing(per)
        yield f"corrected {per}", condensing(per, compensate=True, local=True)
    # Slow experts and a slow network: shadows pay wherever somebody else chose the expert.
    state = ResidencyState(Topology.flat(N, 1e3), flops_per_second=1.0)
    for per, strategy in itertools.product(PER, ("fetch", "shadow") if N > 1 else ()):
        yield f"{strategy} {per}", Hosting(direct(comm, per), LayerResidency(state, comm, scales, strategy), clock)
    planner = Planner(comm, "random", Topology.flat(N), AttentionCost(4))
    for name, inner in (("direct", direct(comm)), ("condensing", condensing("ranks", moves=True))):
        yield f"rebuilding {name}", Rebuilding(inner, planner, layer, may_drop=True, looks_ahead=False)


def gathered(rows: Tensor, batch: TokenBatch, comm: Comm) -> Tensor:
    """Rows of all ranks in the order of global tokens, wherever they are now."""
    out = torch.zeros(batch.layout.table.num_tokens, rows.shape[1], dtype=rows.dtype)
    out[batch.layout.global_token] = rows.detach()
    return comm.all_reduce(out)


def check_identity(name: str, dispatcher: Dispatcher, leaves: tuple[Tensor, Tensor, Tensor], batch: TokenBatch,
                   comm: Comm, experts: ExpertMap, scales: Scales) -> bool:  # fmt: skip
    """Returns whether rows ended on another rank than they began on."""
    hidden, ids, weights = leaves
    after, _ = pass_through(dispatcher, batch, ids, weights, comm, experts, scales=scales)
    before_all = gathered(hidden, batch, comm)
    # The stream plus the identity.
    assert relative_error(gathered(after.hidden, after, comm), 2 * before_all) < EXACT, name
    upstream_all = torch.randn(before_all.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    upstream = upstream_all[after.layout.global_token]
    to_hidden, to_weights, to_scales = torch.autograd.grad(
        after.hidden, (hidden, weights, scales.weight), upstream, allow_unused=True
    )
    at_home = upstream_all[batch.layout.global_token]
    assert relative_error(to_hidden, 2 * at_home) < EXACT, name
    # d out / d weight is the row itself, for each choice that some expert serves; d out / d scale the weighted rows.
    each = (at_home * hidden.detach()).sum(1, keepdim=True) * (ids >= 0)
    assert relative_error(to_weights, each) < EXACT, name
    by_expert = torch.zeros(len(experts.slot_of_expert), 1, dtype=torch.float64)
    by_expert[:, 0].index_add_(0, ids.clamp_min(0).flatten(), (weights.detach() * each).flatten())
    by_slot = torch.zeros_like(by_expert)
    by_slot[experts.slot_of_expert] = comm.all_reduce(by_expert)
    expected = by_slot[comm.mesh.ep_rank * scales.num_local :][: scales.num_local]
    got = torch.zeros_like(expected) if to_scales is None else to_scales
    assert relative_error(got, expected) < 1e-12, name
    return after.layout is not batch.layout


def identity_job(rank: int) -> list[str]:
    """The names of dispatchers behind which sequences moved."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world, moved = comm.mesh.ep_size, []
    for seed, (lengths, (top_k, num_experts, shuffle)) in enumerate(itertools.product(LENGTHS, ROUTINGS)):
        lengths = lengths[:world] if world > 1 else [[n for of in lengths for n in of]]
        experts, scales = expert_map(num_experts, world, shuffle), Scales(num_experts // world)
        for name, dispatcher in dispatchers(comm, scales, seed):
            leaves = leaves_of(rank, sum(lengths[rank]), num_experts, top_k, seed)
            if check_identity(name, dispatcher, leaves, batch_of(leaves[0], lengths, rank), comm, experts, scales):
                moved.append(name)
    return moved


@pytest.mark.parametrize("world", [1, 2, 4])
def test_identity_experts_give_the_stream_twice(world: int) -> None:
    moved = run_ranks(identity_job, world)[0]
    assert set(moved) == ({"rebuilding direct", "rebuilding condensing"} if world > 1 else set())


def coded_job(rank: int) -> None:
    """Rows of whole numbers whose blocks are on int8's grid cross coded links unchanged; so do their gradients."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    generator = torch.Generator().manual_seed(rank)
    hidden = torch.randint(-127, 128, (9, 64), generator=generator).double()
    hidden[:, ::32] = 127
    upstream = torch.randint(-127, 128, (9, 64), generator=generator).double()
    upstream[:, ::32] = 127
    ids = torch.from_numpy(random_routing(rank, 9, 8, 1, seed=5))
    for per, wire in itertools.product(PER, ("int8", "int8,local", "combine=int8,dispatch_backward=int8", "int16")):
        leaf, weights = hidden.clone().requires_grad_(), torch.ones(9, 1, dtype=torch.float64)
        batch, experts = batch_of(leaf, [[4, 5]] * comm.mesh.ep_size, rank), expert_map(8, comm.mesh.ep_size)
        after, _ = pass_through(direct(comm, per, wire), batch, ids, weights, comm, experts)
        close = 0 if "int8" in wire else 2e-3
        torch.testing.assert_close(after.hidden, 2 * hidden, rtol=0, atol=close)
        (to_hidden,) = torch.autograd.grad(after.hidden, leaf, upstream)
        torch.testing.assert_close(to_hidden, 2 * upstream, rtol=0, atol=close)


def scaling_job(rank: int) -> None:
    """Expert e multiplies by (e + 2) and squares: ranks and pairs agree with the sum written out on the spot."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    for seed, (lengths, top_k) in enumerate(itertools.product(LENGTHS, (1, 2, 4))):
        lengths = lengths[: comm.mesh.ep_size]
        experts = expert_map(8, comm.mesh.ep_size, seed)
        hidden, ids, weights = leaves_of(rank, sum(lengths[rank]), 8, top_k, seed)
        factor = (ids.clamp_min(0) + 2.0)[:, :, None] * (ids >= 0)[:, :, None]  # [T, K, 1]
        expected = hidden + (weights[:, :, None] * factor * hidden[:, None, :] ** 2).sum(1)
        upstream = torch.randn(hidden.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        expected_grads = torch.autograd.grad(expected, (hidden, weights), upstream)
        rows_sent = {}
        for per in PER:
            after, copies = pass_through(
                direct(comm, per), batch_of(hidden, lengths, rank), ids, weights, comm, experts,
                lambda rows, e: (e + 2.0)[:, None] * rows**2,
            )  # fmt: skip
            assert relative_error(after.hidden, expected) < EXACT
            grads = torch.autograd.grad(after.hidden, (hidden, weights), upstream)
            for got, want in zip(grads, expected_grads, strict=True):
                assert relative_error(got, want) < EXACT
            rows_sent[per] = sum(copies.exchange.input_splits)
            # Each copy is one token's; by rank a token has at most one copy for each rank.
            assert copies.token.shape == copies.slot.shape == (rows_sent[per] + copies.num_local,)
        assert rows_sent["ranks"] <= rows_sent["pairs"]


def one_after_the_other(rank: int) -> None:
    scaling_job(rank)
    coded_job(rank)


@pytest.mark.parametrize("world", [2, 4])
def test_pairs_ranks_and_coded_links_agree(world: int) -> None:
    run_ranks(one_after_the_other, world)


def counts_job(rank: int) -> tuple[tuple[int, ...], tuple[int, ...], int, int, np.ndarray]:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world = comm.mesh.ep_size
    ids = torch.from_numpy(random_routing(rank, 6, 8, 2, seed=3))
    keys = copy_keys(ids, expert_map(8, world), rank, "ranks")
    wishes = torch.arange(3 * (world + 1)).view(3, world + 1) + 100 * rank  # may be wider than there are ranks
    copies, _, gathered = exchange_counts(keys, ids, comm, wishes)
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
