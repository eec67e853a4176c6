"""Replay: what a recorded step would have put on the wire with other ranks, experts elsewhere, another strategy.

The bytes are counted, not modelled: from each token's choices follow the copies it sends and the rows that come back,
and the planner that places sequences here is the one of training. (That a replayed step equals what the traffic
meter counted in the step itself is tested.) Only token rows are counted, forward; backward moves the same again.
"""

from dataclasses import dataclass, field

import numpy as np

from luffy.plan.cost import AttentionCost
from luffy.plan.placement import plan_placement
from luffy.plan.problem import Balance, PlacementProblem
from luffy.plan.residency import ExpertCosts, expert_traffic, fetched, serving_ranks, shadowed
from luffy.plan.result import PlacementPlan
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep
from luffy.plan.traffic import sum_by_rank
from luffy.seats.layout import SeatLayout
from luffy.seats.predictor import RowPredictor
from luffy.seats.seater import choose_ranks
from luffy.wire_format import RowBytes

LOOK_AHEAD = ("none", "router", "actual")
SEATS = ("as-read", "known", "predicted")


@dataclass(frozen=True, eq=False)
class Wire:
    """The cluster and the way a layer is run on it, as far as bytes depend on it.

    look_ahead, what the planner of layer l takes for layer l + 1's dispatch: "none"; "router", the recorded forecast;
    "actual", what really happened (no planner can know it: the bound). copies: "ranks" or "pairs". residency: of
    luffy.plan.residency, of all layers or of each, with the size of an expert's weights as they travel and, for
    shadows, what things cost.
    row_bytes: of rows in a wire format, by direction; None: row_num_bytes each, as they are.
    seats, where sequences are before the first layer: "as-read", as they were dealt; "known", by the rows that they
    will really send in all layers (the bound); "predicted", by those that `predictor` foretells from their token ids,
    as dealt without one.
    """

    topology: Topology
    row_num_bytes: int
    strategy: str = "stay"
    look_ahead: str = "none"
    copies: str = "ranks"
    attention: AttentionCost = field(default_factory=AttentionCost)
    padded: bool = False
    residency: str | tuple[str, ...] = "static"
    expert_num_bytes: int = 0
    expert_costs: ExpertCosts | None = None
    row_bytes: RowBytes | None = None
    seats: str = "as-read"
    predictor: RowPredictor | None = None

    @property
    def sizes(self) -> RowBytes:
        """Bytes of rows by direction."""
        return RowBytes.uniform(self.row_num_bytes) if self.row_bytes is None else self.row_bytes

    def residency_at(self, layer: int) -> str:
        return self.residency if isinstance(self.residency, str) else self.residency[layer]

    def __post_init__(self) -> None:
        kinds = (self.residency,) if isinstance(self.residency, str) else self.residency
        if "shadow" in kinds and self.expert_costs is None:
            raise ValueError("shadows need expert_costs: their performance model weighs them")
        if self.look_ahead not in LOOK_AHEAD:
            raise ValueError(f"look_ahead {self.look_ahead!r} is none of {', '.join(LOOK_AHEAD)}")
        if self.seats not in SEATS:
            raise ValueError(f"seats {self.seats!r} is none of {', '.join(SEATS)}")
        if self.copies == "pairs" and self.strategy != "stay":
            raise ValueError("pairs do not migrate")


@dataclass(frozen=True, eq=False)
class LayerReplay:
    """One layer of one step. dispatch, combine: bytes by link class (local, intra-node, inter-node), forward; and
    backward, which differ where gradients have formats of their own.

    homes_before, homes_after [S]. problem, plan: what was asked and answered. experts: bytes of weights by link class,
    forward; expert_seconds: of the busiest rank, in each of the two rounds. pairs: int64 [N], (row, expert)
    pairs that each rank computes.
    """

    dispatch: tuple[int, int, int]
    combine: tuple[int, int, int]
    dispatch_backward: tuple[int, int, int]
    combine_backward: tuple[int, int, int]
    homes_before: np.ndarray
    homes_after: np.ndarray
    problem: PlacementProblem
    plan: PlacementPlan
    experts: tuple[int, int, int]
    expert_seconds: tuple[float, float]
    pairs: np.ndarray


def rows_at_ranks(step: TraceStep, ids: np.ndarray, owner: np.ndarray, num_ranks: int, copies: str) -> np.ndarray:
    """int64 [S, N]: copies that each sequence sends to each rank. ids [T, K]; owner [E]."""
    return step.count_by_sequence(np.where(ids >= 0, owner[ids], -1), num_ranks, once=copies == "ranks")


def by_class(counts: np.ndarray, homes: np.ndarray, topology: Topology) -> np.ndarray:
    """int64 [3]: rows by the class of the link between where they are (counts [S, N]) and their homes [S]."""
    everyone, width = np.arange(len(homes)), topology.ranks_per_node
    local = int(counts[everyone, homes].sum())
    on_node = int(counts.reshape(-1, topology.num_nodes, width)[everyone, homes // width].sum())
    return np.array([local, on_node - local, int(counts.sum()) - on_node])


def rows_of_all_layers(step: TraceStep, owners: np.ndarray, num_ranks: int, copies: str = "ranks") -> np.ndarray:
    """int64 [S, N]: what a predictor of seats foretells."""
    layers = range(step.num_layers)
    return np.sum([rows_at_ranks(step, step.chosen[i], owners[i], num_ranks, copies) for i in layers], axis=0)


def seat_step(step: TraceStep, rows: np.ndarray, wire: Wire) -> np.ndarray:
    """Homes [S] of a step's sequences, seated as in training by rows [S, N] that they are expected to send."""
    N = wire.topology.world_size
    layout = SeatLayout(N, padded=wire.padded, topology=wire.topology, attention=wire.attention)
    return choose_ranks(rows, step.lengths, deal(len(step.lengths), N), layout)


def replay_step(
    step: TraceStep, owners: np.ndarray, wire: Wire, home_rank: np.ndarray | None = None
) -> list[LayerReplay]:
    """Run a recorded step through `wire`, layer by layer. owners [layers, E]; home_rank [S] (None: by `wire.seats`,
    dealt in blocks where as read).

    Raises ValueError where owners or homes name a rank that the topology lacks.
    """
    N = wire.topology.world_size
    if owners.shape[0] != step.num_layers or int(owners.max()) >= N:
        raise ValueError(f"owners {owners.shape} do not map {step.num_layers} layers onto {N} ranks")
    counts = [
        rows_at_ranks(step, step.chosen[layer], owners[layer], N, wire.copies) for layer in range(step.num_layers)
    ]
    homes = _homes(step, counts, wire) if home_rank is None else home_rank
    out, sizes = [], wire.sizes
    for layer in range(step.num_layers):
        last = layer + 1 == step.num_layers
        following = None if last else _foresee(step, layer, owners, wire, counts)
        served, experts, expert_seconds = _served(step, layer, owners[layer], homes, wire)
        rows = counts[layer]
        if wire.residency_at(layer) != "static":
            rows = step.count_by_sequence(served, N, once=wire.copies == "ranks")
        problem = PlacementProblem(
            counts=rows,
            lengths=step.lengths,
            home_rank=homes,
            topology=wire.topology,
            row_num_bytes=wire.row_num_bytes,
            next_counts=following,
            attention=wire.attention,
            layout="padded" if wire.padded else "packed",
            balance=Balance.for_lengths(step.lengths),
        )
        plan = plan_placement(wire.strategy, problem)
        sent, returned = (by_class(rows, where, wire.topology) for where in (homes, plan.new_home))
        pairs = np.bincount(served[served >= 0], minlength=N)
        out.append(
            LayerReplay(
                _three(sent * sizes.dispatch),
                _three(returned * sizes.combine),
                _three(sent * sizes.dispatch_backward),
                _three(returned * sizes.combine_backward),
                homes,
                plan.new_home,
                problem,
                plan,
                experts,
                expert_seconds,
                pairs,
            )
        )
        homes = plan.new_home
    return out


def _served(
    step: TraceStep, layer: int, owner: np.ndarray, homes: np.ndarray, wire: Wire
) -> tuple[np.ndarray, tuple[int, int, int], tuple[float, float]]:
    """(rank that serves each choice [T, K], bytes of experts by link class, seconds) of one layer, forward."""
    N, ids, residency = wire.topology.world_size, step.chosen[layer], wire.residency_at(layer)
    if residency == "static":
        return np.where(ids >= 0, owner[ids], -1), (0, 0, 0), (0.0, 0.0)
    chosen = sum_by_rank(step.counts_by_expert(layer, len(owner)), homes, N)
    if residency == "fetch":
        resident = fetched(chosen, owner)
    else:
        assert wire.expert_costs is not None
        resident = shadowed(chosen, owner, wire.expert_costs)
    rounds = expert_traffic(resident, owner, wire.topology, relay_at_home=residency == "shadow")
    intra, inter = (sum(float(getattr(r, side).sum()) for r in rounds) for side in ("intra_in", "inter_in"))
    size = wire.expert_num_bytes
    seconds = (rounds[0].seconds(size, wire.topology), rounds[1].seconds(size, wire.topology))
    served = serving_ranks(ids, owner, resident, np.repeat(homes, step.lengths), moves=wire.strategy != "stay")
    return served, (0, round(intra * size), round(inter * size)), seconds


def _three(array: np.ndarray) -> tuple[int, int, int]:
    local, intra, inter = (int(n) for n in array)
    return local, intra, inter


def _foresee(
    step: TraceStep, layer: int, owners: np.ndarray, wire: Wire, counts: list[np.ndarray]
) -> np.ndarray | None:
    """The next layer's copies by sequence and rank, int64 [S, N], as the planner of `layer` expects them."""
    if wire.look_ahead == "none" or wire.strategy == "stay":
        return None
    if wire.look_ahead == "actual":
        return counts[layer + 1]
    return rows_at_ranks(step, step.foreseen[layer], owners[layer + 1], wire.topology.world_size, wire.copies)


def _homes(step: TraceStep, counts: list[np.ndarray], wire: Wire) -> np.ndarray:
    """Where the step's sequences are before the first layer, [S]."""
    if wire.seats == "known":
        return seat_step(step, np.sum(counts, axis=0), wire)
    if wire.seats == "predicted" and wire.predictor is not None and step.features is not None:
        return seat_step(step, wire.predictor.predict(step.features, step.lengths), wire)
    return deal(len(step.lengths), wire.topology.world_size)


def deal(num_sequences: int, num_ranks: int) -> np.ndarray:
    """Homes of a step's sequences as the loader deals them: consecutive blocks, as even as they can be, int64 [S]."""
    return np.arange(num_sequences, dtype=np.int64) * num_ranks // max(1, num_sequences)


def spread_evenly(num_layers: int, num_experts: int, num_ranks: int) -> np.ndarray:
    """The mapping a model starts with: expert e on rank e // (E / N), in every layer. int64 [layers, E]."""
    if num_experts % num_ranks:
        raise ValueError(f"{num_experts} experts do not divide over {num_ranks} ranks")
    return np.tile(np.arange(num_experts) // (num_experts // num_ranks), (num_layers, 1)).astype(np.int64)
