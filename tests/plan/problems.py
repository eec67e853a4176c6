"""Problems for the planner's tests: small, synthetic, made from a seed."""

import itertools

import numpy as np

from luffy.plan.placement import Balance, PlacementProblem, weighted_bytes
from luffy.plan.synthetic import synthetic_counts
from luffy.plan.topology import Topology


def topology(num_ranks: int, ranks_per_node: int | None = None) -> Topology:
    """PCIe inside a node, 10 Gb/s Ethernet between nodes."""
    return Topology(num_ranks, ranks_per_node or num_ranks, 8e9, 1.25e9)


def make_problem(
    num_sequences: int,
    num_ranks: int,
    *,
    seed: int = 0,
    ranks_per_node: int | None = None,
    uneven: bool = False,
    lookahead: bool = False,
    **options: object,
) -> PlacementProblem:
    """Synthetic counts; sequences dealt to ranks in turn. uneven: lengths vary, balance is by tokens."""

    def trace(seed: int) -> np.ndarray:
        domains, popularity = 3 if seed % 2 else 0, 0.4 * (seed % 3)
        return synthetic_counts(
            num_sequences, num_ranks, seed=seed, length=256, num_domains=domains, popularity=popularity
        )

    counts = trace(seed)
    lengths = np.full(num_sequences, 256)
    if uneven:
        rng = np.random.default_rng(seed)
        lengths = np.clip(rng.lognormal(5.0, 0.6, num_sequences), 0, 1024).astype(np.int64)
        lengths[rng.random(num_sequences) < 0.05] = 0
        counts = counts * lengths[:, None] // 256
        options.setdefault("balance", Balance("tokens", 0.1))
    if lookahead:
        options["next_counts"] = trace(seed + 1)
    return PlacementProblem(
        counts=counts,
        lengths=lengths,
        home_rank=np.arange(num_sequences) % num_ranks,
        topology=topology(num_ranks, ranks_per_node),
        row_num_bytes=1536,
        **options,  # type: ignore[arg-type]
    )


def brute_force(problem: PlacementProblem) -> int:
    """The least weighted bytes of any placement that keeps the count of every rank, by trying them all."""
    homes = problem.home_rank.tolist()
    return min(weighted_bytes(problem, np.array(new_home)) for new_home in set(itertools.permutations(homes)))
