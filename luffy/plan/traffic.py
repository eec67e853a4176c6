"""From a placement to bytes on each kind of link, and from a problem to the matrix that strategies optimise.

With W0 = 0 <= W1, W2 the weights of the local, intra-node and inter-node classes, the wire time of sequence s at
rank j is

    W2 * (all its rows)  -  (W2 - W1) * (its rows on the node of j)  -  W1 * (its rows on j).

The first term is the same everywhere, so a strategy may maximise the *benefit* B[s, j] = (W2 - W1) * node_rows + W1
* rows instead of minimising a matrix product: O(S N) rather than O(S N^2), which is most of a millisecond at 1024 x
64.
"""

import math
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_array

from luffy.plan.problem import PlacementProblem


class RankTraffic(NamedTuple):
    """int64 [N, 2] each, bytes through (intra-node, inter-node) links of every rank."""

    sent: np.ndarray
    received: np.ndarray


def num_bytes_per_class(problem: PlacementProblem, new_home: np.ndarray) -> tuple[int, int, int]:
    """Bytes that stay local, cross a node's links and cross nodes when sequence s is placed at new_home[s].

    Combine and predicted next dispatch together. Exact Python integers.
    """
    rows, topology = problem.rows, problem.topology
    total = problem.total_rows
    everyone = np.arange(problem.num_sequences)
    local = int(rows[everyone, new_home].sum())
    if topology.num_nodes == 1:
        on_node = total
    elif topology.ranks_per_node == 1:
        on_node = local
    else:
        width = topology.ranks_per_node
        by_node = rows.reshape(-1, topology.num_nodes, width)
        on_node = int(by_node[everyone, new_home // width].sum())
    unit = problem.row_num_bytes
    return local * unit, (on_node - local) * unit, (total - on_node) * unit


def weighted_bytes(problem: PlacementProblem, new_home: np.ndarray) -> int:
    """Femtoseconds of wire that new_home costs, summed over ranks: the objective of every strategy."""
    return problem.topology.weighted_bytes(num_bytes_per_class(problem, new_home))


class Benefit(NamedTuple):
    """values [S, N], larger is better; one unit of them is `unit_femtoseconds` of wire.

    `exact` says that nothing was rounded: the assignment that maximises values minimises the true wire time.
    """

    values: np.ndarray
    unit_femtoseconds: float
    exact: bool
    two_tier: "TwoTier | None" = None


class TwoTier(NamedTuple):
    """The parts of a benefit matrix on several nodes of several ranks, by node for whole-array passes.

    values[s, node * width + r] = rank_values[node, r, s] + node_values[node, s].
    """

    rank_values: np.ndarray
    node_values: np.ndarray


def benefit_matrix(problem: PlacementProblem, max_bits: int = 44, row_weights: np.ndarray | None = None) -> Benefit:
    """Wire time saved by placing s at j, against all its rows crossing nodes.

    values is int32 when max_bits <= 30, else int64, every entry below 2**max_bits in size. Link weights are reduced by
    their common divisor (and rounded to 10 bits if int32 is asked for and they are still longer); rows that do not fit
    beside them lose low bits. row_weights: optional int64 [N], a multiplier of the rows held at each rank.
    """
    dtype = np.int32 if max_bits <= 30 else np.int64
    local, node, scale, exact = _reduced_weights(problem, 1 << 10 if dtype is np.int32 else 1 << 30)
    width = problem.topology.ranks_per_node
    rows = problem.rows
    bound = int(rows.max(initial=0)) * (local + abs(node) * width)
    if row_weights is not None:
        rows, exact = rows * row_weights, False
        bound *= int(row_weights.max(initial=1))
    shift = max(0, bound.bit_length() - max_bits)
    if shift:
        rows, exact = rows >> shift, False
    rows = rows.astype(dtype)
    scale_to_femtoseconds = problem.row_num_bytes * scale * 2.0**shift
    if not node:
        return Benefit(rows, scale_to_femtoseconds, exact)
    # numpy reduces contiguous columns several times faster than a short last axis: transpose once, then sum.
    by_node = np.ascontiguousarray(rows.T).reshape(problem.topology.num_nodes, width, len(rows))
    node_values = np.add.reduce(by_node, axis=1, dtype=dtype) * dtype(node)
    by_node *= dtype(local)
    values = rows * dtype(local)
    values.reshape(len(rows), len(by_node), width)[...] += node_values.T[:, :, None]
    return Benefit(values, scale_to_femtoseconds, exact, TwoTier(by_node, node_values))


def _reduced_weights(problem: PlacementProblem, limit: int) -> tuple[int, int, float, bool]:
    """(weight of rows on the rank, weight of rows on its node, femtoseconds per unit of weight, nothing rounded)."""
    topology = problem.topology
    _, intra, inter = topology.class_weights
    if topology.num_nodes == 1:
        return 1, 0, float(intra), True
    if topology.ranks_per_node == 1 or intra == inter:
        return 1, 0, float(inter), True
    local, node = intra, inter - intra
    largest = max(local, abs(node))
    divisor = math.gcd(local, node)
    if largest // divisor <= limit:
        return local // divisor, node // divisor, float(divisor), True
    return round(local * limit / largest), round(node * limit / largest), largest / limit, False


def sum_by_rank(rows: np.ndarray, ranks: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [N, n]: rows [S, n] summed by the rank [S] of each. `np.add.at` takes several times as long."""
    S = len(ranks)
    chosen = csr_array((np.ones(S, dtype=np.int64), (ranks, np.arange(S))), shape=(num_ranks, S))
    return np.asarray(chosen @ rows)


def rank_traffic(problem: PlacementProblem, new_home: np.ndarray) -> RankTraffic:
    """Bytes that each rank sends and receives in the combine (and look-ahead) rows of this placement.

    What a rank sends is decided by how popular its experts are, less what placement keeps on the rank or its node.
    """
    rows, N = problem.rows, problem.num_ranks
    arrived = sum_by_rank(rows, new_home, N)  # arrived[j, r]: rows held at r of the sequences placed at j
    classes = problem.topology.link_class_matrix()
    sent = np.stack([np.where(classes == c, arrived, 0).sum(axis=0) for c in (1, 2)], axis=1)
    received = np.stack([np.where(classes == c, arrived, 0).sum(axis=1) for c in (1, 2)], axis=1)
    return RankTraffic(sent * problem.row_num_bytes, received * problem.row_num_bytes)


def bottleneck_femtoseconds(problem: PlacementProblem, new_home: np.ndarray) -> int:
    """The longest time any one rank's link is busy in any one direction: bytes times weight, latency left out."""
    weights = np.array(problem.topology.class_weights[1:], dtype=object)  # Python integers: no overflow
    traffic = rank_traffic(problem, new_home)
    return max((int((side * weights).max(initial=0)) for side in traffic), default=0)
