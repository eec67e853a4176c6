"""What a recipe would cost on a cluster that one does not have: bytes counted from a trace, seconds predicted.

Bytes come from replaying recorded routing (`luffy.plan.replay`): they are counts, as exact as the trace is typical.
Seconds are a model of the links and nothing else. An exchange ends when its busiest rank has sent and received
everything: bytes of a link class over that class's rate, in full duplex, the two classes side by side, and one
latency of the slowest class in use. Layers follow each other, and backward moves the same bytes as forward.

Left out: contention between ranks of a node for one network card (give each rank its share as the rate), gradient
synchronisation, and any overlap with computation. So the seconds are those that an exchange keeps a link busy.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from luffy.plan.mapping import learn_rows, plan_mapping
from luffy.plan.replay import LayerReplay, Wire, deal, replay_step
from luffy.plan.topology import LinkClass, Topology
from luffy.plan.trace import TraceStep
from luffy.plan.traffic import sum_by_rank


@dataclass(frozen=True)
class Prediction:
    """Of one step, forward and backward, mean over the steps counted.

    dispatch, combine, experts: bytes by link class (local, intra-node, inter-node), summed over ranks.
    exchange_seconds: of the busiest rank of each exchange. moved_share: of the sequences of all layers, behind them.
    num_steps: counted. seated_share: of the sequences, that were computed elsewhere than dealt. busiest_rows: that the
    busiest rank of each dispatch and each combine sends or receives, whichever is more, summed over them, forward.
    step_seconds: exchange_seconds of each step counted.
    """

    recipe: str
    dispatch: tuple[float, float, float]
    combine: tuple[float, float, float]
    exchange_seconds: float
    moved_share: float
    num_steps: int
    rehomed: bool = False
    experts: tuple[float, float, float] = (0.0, 0.0, 0.0)
    seated_share: float = 0.0
    busiest_rows: float = 0.0
    step_seconds: tuple[float, ...] = ()

    @property
    def num_bytes(self) -> tuple[float, float]:
        """(intra-node, inter-node): rows in both directions, and experts."""
        intra, inter = (self.dispatch[i] + self.combine[i] + self.experts[i] for i in (1, 2))
        return intra, inter


def exchange_seconds(rows: np.ndarray, homes: np.ndarray, row_num_bytes: int | float, topology: Topology) -> float:
    """Seconds of one all-to-all between homes [S] and the ranks of rows [S, N]; the way back takes as long."""
    return _seconds_between(sum_by_rank(rows, homes, topology.world_size), row_num_bytes, topology)


def _seconds_between(between: np.ndarray, row_num_bytes: int | float, topology: Topology) -> float:
    """between [N, N]: rows from each rank (column) to each (row)."""
    classes, slowest, latency = topology.link_class_matrix(), 0.0, 0.0
    rates = (topology.intra_node_bytes_per_second, topology.inter_node_bytes_per_second)
    for link, rate in zip((LinkClass.INTRA_NODE, LinkClass.INTER_NODE), rates, strict=True):
        over = np.where(classes == link, between, 0)
        busiest = int(max(over.sum(0).max(), over.sum(1).max()))
        slowest = max(slowest, busiest * row_num_bytes / rate)
        if busiest:
            latency = max(latency, topology.latency_seconds[link])
    return slowest + latency


def busiest_rows(layer: LayerReplay, topology: Topology) -> int:
    """Rows through the busiest rank of the layer's dispatch and of its combine, forward: the larger of in and out."""
    apart, total = topology.link_class_matrix() > 0, 0
    for homes in (layer.homes_before, layer.homes_after):
        between = np.where(apart, sum_by_rank(layer.problem.counts, homes, topology.world_size), 0)
        total += int(max(between.sum(0).max(), between.sum(1).max()))
    return total


def token_seconds(layer: LayerReplay, wire: Wire) -> float:
    """Seconds of one layer's exchanges of rows, forward and backward."""
    sizes, links, N = wire.sizes, wire.topology, wire.topology.world_size
    out, into = (sum_by_rank(layer.problem.counts, homes, N) for homes in (layer.homes_before, layer.homes_after))
    there = sum(_seconds_between(out, n, links) for n in (sizes.dispatch, sizes.dispatch_backward))
    back = sum(_seconds_between(into, n, links) for n in (sizes.combine, sizes.combine_backward))
    return there + back


def predict(
    recipe: str, steps: Sequence[TraceStep], owners: np.ndarray, wire: Wire, rehome: bool = False
) -> Prediction:
    """Run the recorded steps of one trace through `wire`. owners [layers, E].

    rehome: first fit a mapping of experts to the earlier half of the steps, judge it on the next quarter, and count on
    the rest, which neither has seen. Needs at least four steps, and is left out with fewer. The bytes of moving
    experts are not weighed: what is asked is what a mapping can do. Where seats are predicted, the predictor is learnt
    from the steps that are not counted; without any, or without features in the trace, sequences stay as dealt.

    Raises ValueError as `replay_step` does, or without steps.
    """
    if not steps:
        raise ValueError("a prediction needs recorded steps")
    rehome = rehome and len(steps) >= 4 and wire.topology.world_size > 1
    counted = counted_steps(steps)
    if rehome:
        half = len(steps) // 2
        fit, judge = steps[:half], steps[half : len(steps) - len(counted)]
        owners = plan_mapping(fit, judge, owners, wire, expert_num_bytes=0, steps_until_next=1).owners
    if wire.seats == "predicted":
        wire = replace(wire, predictor=learn_rows(steps[: len(steps) - len(counted)], owners, wire))
    replays = [replay_step(step, owners, wire) for step in counted]
    layers = [layer for replay in replays for layer in replay]
    n, N = len(counted), wire.topology.world_size

    def total(parts: list[tuple[int, int, int]]) -> tuple[float, float, float]:
        local, intra, inter = np.array(parts, dtype=np.float64).sum(0) / n
        return float(local), float(intra), float(inter)

    sequences = sum(len(layer.homes_before) for layer in layers)
    moved = sum(int((layer.homes_before != layer.homes_after).sum()) for layer in layers)
    seated = sum(int((r[0].homes_before != deal(len(r[0].homes_before), N)).sum()) for r in replays if r)
    dealt = sum(len(r[0].homes_before) for r in replays if r)
    seconds = tuple(sum(token_seconds(layer, wire) + 2 * sum(layer.expert_seconds) for layer in r) for r in replays)
    return Prediction(
        recipe,
        total([part for layer in layers for part in (layer.dispatch, layer.dispatch_backward)]),
        total([part for layer in layers for part in (layer.combine, layer.combine_backward)]),
        sum(seconds) / n,
        moved / max(1, sequences),
        n,
        rehome,
        total([layer.experts for layer in layers] * 2),
        seated / max(1, dealt),
        sum(busiest_rows(layer, wire.topology) for layer in layers) / n,
        seconds,
    )


def counted_steps(steps: Sequence[TraceStep]) -> Sequence[TraceStep]:
    """The last quarter of the steps, at least one: the same for every recipe, so that all count the same tokens."""
    return steps[-max(1, len(steps) // 4) :]
