"""Exact assignment under equal counts: the optimum itself, and NetMoE's two-stage form of it.

Repeat the column of every rank once for each sequence it must keep, and placement becomes a square assignment problem
that `scipy.optimize.linear_sum_assignment` solves exactly (a shortest-augmenting-path relative of Kuhn-Munkres). That
costs S x S memory and tens to hundreds of milliseconds at a thousand sequences: a yardstick, and fine for small cases.
"""

import numpy as np
from scipy.optimize import linear_sum_assignment

from luffy.plan.problem import Balance, PlacementProblem
from luffy.plan.result import PlacementPlan, make_plan
from luffy.plan.traffic import benefit_matrix

_BY_SEQUENCES = Balance("sequences")


def exact(problem: PlacementProblem) -> PlacementPlan:
    """The placement of fewest weighted bytes among all that keep the number of sequences on each rank.

    Always balances sequence counts, also where the problem asks for token budgets: the plan says so in its `balance`.
    """
    benefit = benefit_matrix(problem)
    new_home = assign(benefit.values, problem.quotas)
    return make_plan(problem, "exact", new_home, balance=_BY_SEQUENCES, never_above_stay=True, optimal=benefit.exact)


def netmoe(problem: PlacementProblem) -> PlacementPlan:
    """NetMoE (Liu et al., ICLR 2025): assign sequences to nodes by inter-node traffic, then to ranks inside each node.

    Each stage is an exact assignment under equal counts; the traffic is this layer's combine plus, if the problem
    predicts it, the next layer's dispatch. Deciding between nodes first gives up little, because bytes between nodes
    cost most, and splits one large assignment into a node stage and small ones. On a single node it is `exact`.
    Always balances sequence counts; the plan says so in its `balance`.
    """
    topology, rows = problem.topology, problem.rows
    width = topology.ranks_per_node
    on_node = rows.reshape(len(rows), topology.num_nodes, width).sum(axis=2)
    node_of = assign(on_node, problem.quotas.reshape(topology.num_nodes, width).sum(axis=1))
    new_home = np.empty_like(problem.home_rank)
    for node in range(topology.num_nodes):
        members = np.flatnonzero(node_of == node)
        ranks = slice(node * width, (node + 1) * width)
        new_home[members] = node * width + assign(rows[members, ranks], problem.quotas[ranks])
    return make_plan(problem, "netmoe", new_home, balance=_BY_SEQUENCES, never_above_stay=topology.num_nodes == 1)


def assign(benefit: np.ndarray, quotas: np.ndarray) -> np.ndarray:
    """int64 [S]: column of each row so that column j is used quotas[j] times and the total benefit is greatest.

    benefit: int64 [S, C]. Entries are shifted down to 44 bits if need be: the solver computes in doubles, and its
    path sums stay exact integers below 2**53 only if there is room above the entries.
    """
    if not len(benefit):
        return np.empty(0, dtype=np.int64)
    shift = max(0, int(np.abs(benefit).max()).bit_length() - 44)
    benefit = benefit >> shift if shift else benefit
    if (quotas == 1).all():
        return linear_sum_assignment(benefit, maximize=True)[1]
    slots = np.repeat(np.arange(len(quotas)), quotas)
    return slots[linear_sum_assignment(benefit[:, slots], maximize=True)[1]]
