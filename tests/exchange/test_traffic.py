"""The meter counts what the routing says must travel, byte for byte, by direction and by link.

The expected counts are made from the choices alone: see `ExpectedTraffic`.
"""

from __future__ import annotations

import numpy as np
import torch

from luffy.comm import LINK_CLASSES, Comm, build_mesh
from luffy.comm.meter import by_direction, by_link
from luffy.testing import run_ranks

from .expected import ExpectedTraffic, Size
from .routes import PER, batch_of, direct, expert_map, pass_through, random_routing

WIDTH, EXPERTS = 6, 8
# (EP size, choices a token, dtype, seed of the experts' places)
EXCHANGES = ((4, 2, torch.float64, None), (4, 4, torch.bfloat16, 2), (2, 3, torch.float32, 1))


def meter_job(rank: int, per: str, ep_size: int, top_k: int, dtype: torch.dtype, shuffle: int | None) -> np.ndarray:
    """Bytes of one exchange. Rank 3 has no token."""
    comm = Comm.create(build_mesh(torch.device("cpu"), ep_size, ranks_per_node=2))
    ids = torch.from_numpy(random_routing(rank, 9 - 3 * rank, EXPERTS, top_k, seed=1, drop=0.1))
    hidden = torch.randn(len(ids), WIDTH, dtype=dtype, requires_grad=True)
    weights = torch.rand(ids.shape, dtype=torch.promote_types(dtype, torch.float32), requires_grad=True)
    first = rank // ep_size * ep_size
    batch = batch_of(hidden, [[9 - 3 * r] for r in range(first, first + ep_size)], comm.mesh.ep_rank)
    after, _ = pass_through(direct(comm, per), batch, ids, weights, comm, expert_map(EXPERTS, ep_size, shuffle))
    after.hidden.sum().backward()
    counts = comm.meter.take()
    assert not comm.meter.read().any() and not comm.meter.read_to_rank().any()
    counts[:, LINK_CLASSES.index("local")] = 0  # what stays is nobody's traffic
    return counts


def all_jobs(rank: int, cases: list[tuple]) -> list[np.ndarray]:
    return [meter_job(rank, *case) for case in cases]


def test_one_exchange() -> None:
    """With ep_size 2 an EP group is a node, so that nothing leaves it."""
    cases = [(per, *how) for per in PER for how in EXCHANGES]
    for case, counts in zip(cases, zip(*run_ranks(all_jobs, 4, cases), strict=True), strict=True):
        check_one_exchange(np.stack(counts), *case)


def check_one_exchange(
    counts: np.ndarray, per: str, ep_size: int, top_k: int, dtype: torch.dtype, shuffle: int | None
) -> None:
    slots = expert_map(EXPERTS, ep_size, shuffle).slot_of_expert.tolist()
    owner = [slot // (EXPERTS // ep_size) for slot in slots]
    expected = ExpectedTraffic()
    for first in range(0, 4, ep_size):
        group = range(first, first + ep_size)
        routings = [random_routing(r, 9 - 3 * r, EXPERTS, top_k, seed=1, drop=0.1) for r in group]
        size = Size(per, row=WIDTH * dtype.itemsize, weight=max(4, dtype.itemsize))
        expected.exchange(routings, group, owner, size)
    np.testing.assert_array_equal(counts, expected.bytes)
    total = by_direction(counts.sum(0))
    assert total["dispatch"] == total["combine"] == total["dispatch_backward"] == total["combine_backward"] > 0
    assert (by_link(counts.sum(0))["inter_node"] > 0) == (ep_size == 4)


def test_deduplication_saves_what_the_routing_allows() -> None:
    """With two ranks and four choices a token visits each rank once at most: rows are counted, not pairs."""
    results = run_ranks(all_jobs, 2, [(per, 2, 4, torch.float32, None) for per in PER])
    pairs, ranks = (by_direction(np.stack(counts).sum(0))["dispatch"] for counts in zip(*results, strict=True))
    rows = [random_routing(r, 9 - 3 * r, EXPERTS, 4, seed=1, drop=0.1) for r in range(2)]
    away = [(ids >= 0) & (ids // 4 != r) for r, ids in enumerate(rows)]
    assert pairs == sum(int(a.sum()) for a in away) * WIDTH * 4
    assert ranks == sum(int(a.any(1).sum()) for a in away) * WIDTH * 4
    assert ranks < pairs
