"""Residency: which ranks hold which experts while a layer runs, and how the weights get there.

One boolean matrix [experts, ranks] says it all; the owner of an expert always holds it. Strategies fill in the rest:

* static: nobody else. Tokens travel to experts.
* fetch (EXT; Janus, SIGCOMM 2023): each rank that chose an expert holds it. Experts travel to tokens.
* shadow (HYT; FasterMoE, PPoPP 2022): every rank holds the experts that so many tokens chose that moving the expert is
  cheaper than moving those; the rest is static.

A choice is served where its token is if that rank holds the expert, else by the expert's owner.

Weights travel as rows, a row being one of `parts` equal parts of an expert. A rank of the owner's own node gets all of
them from the owner. To another node each part goes once, to one of the ranks that want it, which hands it to the
others there: a *relay*. What is popular enough for a shadow is relayed within its own node too, so that its owner's
link is not the bottleneck (a scatter and an all-gather, as a broadcast of large messages is best done). Gradients go
the same way back and are summed where the weights had branched.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from luffy.plan.topology import FEMTOSECONDS_PER_SECOND, Topology


@dataclass(frozen=True)
class ExpertCosts:
    """Femtoseconds, integers so that all ranks decide alike: computing one (row, expert) pair forward and backward;
    one row over the slowest link, once; one expert over it, once."""

    pair: int
    row: int
    expert: int


def expert_costs(
    topology: Topology, flops_per_second: float, hidden_size: int, expert_size: int, itemsize: int
) -> ExpertCosts:
    """For experts of `expert_size` weights: 2 operations a weight and row, and twice that backward."""
    per_byte = topology.class_weights[2 if topology.num_nodes > 1 else 1]
    pair = round(6 * expert_size * FEMTOSECONDS_PER_SECOND / flops_per_second)
    return ExpertCosts(pair, hidden_size * itemsize * per_byte, expert_size * itemsize * per_byte)


def at_owners(owner: np.ndarray, num_ranks: int) -> np.ndarray:
    """The static matrix. owner: int64 [E] -> bool [E, N]."""
    return owner[:, None] == np.arange(num_ranks)


def fetched(counts: np.ndarray, owner: np.ndarray) -> np.ndarray:
    """Each rank holds what its tokens chose. counts: int64 [N, E] choices of each rank -> bool [E, N]."""
    return at_owners(owner, len(counts)) | (counts.T > 0)


def shadowed(counts: np.ndarray, owner: np.ndarray, costs: ExpertCosts) -> np.ndarray:
    """FasterMoE's Algorithm 1: experts in order of load are shadowed until one does not pay. -> bool [E, N].

    counts: int64 [N, E]. The step of a layer takes, by its performance model,

        B_max * pair  +  4 * T_max * row  +  2 * shadows * expert

    with B_max the pairs that the busiest rank computes, T_max the pairs that the busiest rank receives (two exchanges
    forward, two backward), and each shadow broadcast once and its gradient reduced once. The released code takes the
    load of the largest expert that is not shadowed for both maxima, which is the same with one expert a rank and all
    its tokens remote; here each rank is counted.
    """
    N = len(counts)
    resident = at_owners(owner, N)
    served_at = np.where(np.eye(N, dtype=bool)[owner].T, counts.sum(0), 0)  # [N, E]: where each expert's pairs are
    computed = served_at.sum(1)
    received = np.where(resident.T, counts.sum(0) - counts, 0).sum(1)

    def seconds(shadows: int) -> int:
        return int(computed.max()) * costs.pair + 4 * int(received.max()) * costs.row + 2 * shadows * costs.expert

    best = seconds(0)
    for shadows, e in enumerate(np.argsort(-counts.sum(0), kind="stable"), start=1):
        computed = computed - served_at[:, e] + counts[:, e]
        received[owner[e]] -= counts[:, e].sum() - counts[owner[e], e]
        if seconds(shadows) >= best:
            break
        best = seconds(shadows)
        resident[e] = True
    return resident


def serving_ranks(
    ids: np.ndarray, owner: np.ndarray, resident: np.ndarray, home: np.ndarray, *, moves: bool
) -> np.ndarray:
    """Where choices are served: int64 [T, K], -1 for id -1. ids [T, K]; home int64 [T], of each token.

    moves: where sequences move, an expert that every rank holds is served wherever the token's first other choice is,
    so that it costs no row of its own.
    """
    known = np.maximum(ids, 0)
    rank = np.where(resident[known, home[:, None]], home[:, None], owner[known])
    if moves:
        free = np.asarray(resident.all(axis=1))[known]
        bound = (ids >= 0) & ~free
        first = np.take_along_axis(rank, bound.argmax(1)[:, None], 1)
        rank = np.where(free & bound.any(1, keepdims=True), first, rank)
    return np.where(ids < 0, -1, rank)


@dataclass(frozen=True)
class ExpertTraffic:
    """One round of a delivery, in experts: what each rank sends and receives, float64 [N], by class of link."""

    intra_out: np.ndarray
    intra_in: np.ndarray
    inter_out: np.ndarray
    inter_in: np.ndarray

    def seconds(self, expert_num_bytes: int, topology: Topology) -> float:
        """Of the busiest rank, full duplex, the two classes side by side, and the slowest latency in use."""
        slowest = latency = 0.0
        for link, rate, out, into in (
            (1, topology.intra_node_bytes_per_second, self.intra_out, self.intra_in),
            (2, topology.inter_node_bytes_per_second, self.inter_out, self.inter_in),
        ):
            busiest = float(max(out.max(), into.max()))
            slowest = max(slowest, busiest * expert_num_bytes / rate)
            latency = max(latency, topology.latency_seconds[link] if busiest else 0.0)
        return slowest + latency


def expert_traffic(
    resident: np.ndarray, owner: np.ndarray, topology: Topology, *, relay_at_home: bool
) -> tuple[ExpertTraffic, ExpertTraffic]:
    """What `deliver` would move, in its two rounds, without planning each part: relays share their work evenly."""
    E, N = resident.shape
    guests = (resident & ~at_owners(owner, N)).reshape(E, topology.num_nodes, topology.ranks_per_node)
    count = guests.sum(2)  # [E, nodes]
    at_home = (owner // topology.ranks_per_node)[:, None] == np.arange(topology.num_nodes)
    through = (count > 1) & (relay_at_home | ~at_home)
    share = 1 / np.maximum(count, 1)

    def of_owners(sent: np.ndarray) -> np.ndarray:
        return np.bincount(owner, sent, minlength=N)

    def of_guests(each: np.ndarray) -> np.ndarray:
        return (guests * each[:, :, None]).sum(0).reshape(N)

    leaves = np.where(through, 1, count)  # whole experts that the owner sends to a node
    arrives = np.where(through, share, 1.0)
    first = ExpertTraffic(
        of_owners((leaves * at_home).sum(1)),
        of_guests(arrives * at_home),
        of_owners((leaves * ~at_home).sum(1)),
        of_guests(arrives * ~at_home),
    )
    passed_on = of_guests(through * (count - 1) * share)
    nothing = np.zeros(N)
    return first, ExpertTraffic(passed_on, passed_on, nothing, nothing)


@dataclass(frozen=True, eq=False)
class Delivery:
    """How the weights reach the ranks that are to hold them, in two rounds.

    first, second: int64 [n, 4], one part of one expert each: from rank, to rank, expert, part. The first is from
    owners, the second from relays. resident: bool [E, N] afterwards. owner: int64 [E].
    """

    resident: np.ndarray
    owner: np.ndarray
    parts: int
    first: np.ndarray
    second: np.ndarray

    def guests_of(self, rank: int) -> np.ndarray:
        """Experts that a rank holds and does not own, in order: int64 [F]."""
        return np.flatnonzero(self.resident[:, rank] & (self.owner != rank))

    def num_guests(self) -> np.ndarray:
        """int64 [N]."""
        return self.resident.sum(0) - np.bincount(self.owner, minlength=self.resident.shape[1])

    def check(self) -> None:
        """Raise ValueError unless every guest gets each of its parts once, from a rank that has it."""
        has = {(int(self.owner[e]), e, p) for e in range(len(self.owner)) for p in range(self.parts)}
        for moves in (self.first, self.second):
            arrived = [(int(to), int(e), int(p)) for _, to, e, p in moves]
            if any((int(src), int(e), int(p)) not in has for src, _, e, p in moves):
                raise ValueError("a rank was to send a part of an expert that it does not hold")
            if len(set(arrived)) < len(arrived) or has & set(arrived):
                raise ValueError("a part of an expert was to arrive twice")
            has |= set(arrived)
        wanted = {(r, int(e), p) for e, r in np.argwhere(self.resident) for p in range(self.parts)}
        if has != wanted:
            raise ValueError("a part of an expert would not arrive where it is to be held, or elsewhere too")


def deliver(resident: np.ndarray, owner: np.ndarray, topology: Topology, *, relay_at_home: bool) -> Delivery:
    """Plan the delivery of bool [E, N]. relay_at_home: relays in the owner's node too."""
    return _deliver(resident.tobytes(), owner.tobytes(), resident.shape, topology, relay_at_home)


@lru_cache(maxsize=256)  # what a layer holds changes little from step to step
def _deliver(held: bytes, owned: bytes, shape: tuple[int, int], topology: Topology, relay_at_home: bool) -> Delivery:
    resident, owner = np.frombuffer(held, dtype=bool).reshape(shape), np.frombuffer(owned, dtype=np.int64)
    width = topology.ranks_per_node
    relays = relay_at_home or topology.num_nodes > 1
    parts = width if relays else 1
    first: list[tuple[int, int, int, int]] = []
    second: list[tuple[int, int, int, int]] = []
    for e, home in enumerate(owner.tolist()):
        holders = np.flatnonzero(resident[e])
        for node in range(topology.num_nodes):
            there = [int(r) for r in holders if r // width == node and r != home]
            if not there:
                continue
            through = len(there) > 1 and (relay_at_home or node != home // width)
            for p in range(parts):
                if not through:
                    first += [(home, r, e, p) for r in there]
                    continue
                relay = there[(p + e) % len(there)]
                first.append((home, relay, e, p))
                second += [(relay, r, e, p) for r in there if r != relay]

    def table(moves: list[tuple[int, int, int, int]]) -> np.ndarray:
        return np.array(moves, dtype=np.int64).reshape(-1, 4)

    return Delivery(resident, owner, parts, table(first), table(second))
