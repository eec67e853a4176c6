"""Which rank should own which expert, in all layers together, from a few recorded steps.

Where a layer's experts should live depends on where sequences are when they arrive (its dispatch) and on where they are
rebuilt (its combine); where sequences go depends on where experts live. So the two are improved in turn, as in k-means:

    homes of the recorded sequences, layer by layer  <-  replay with the present mapping (the planner of training)
    mapping of each layer                            <-  plan_rehoming: experts to the homes of the tokens that want
                                                         them before and after the layer, co-chosen experts together

from several starts: the present mapping, and homes frozen as some layer leaves them (so that one grouping of the
sequences may serve all layers). Where sequences take seats, those of the search are by the rows that they really send
in all layers.

The best is *judged on steps that nothing was fitted to*, with seats predicted by a predictor that was fitted to the
others; by the wire time of the busiest rank of each exchange, since that is when an exchange ends; and moved only if
what it saves until the next time exceeds what moving weights and optimizer state costs.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from luffy.plan.rehoming import RehomingProblem, plan_rehoming
from luffy.plan.replay import LayerReplay, Wire, replay_step, rows_of_all_layers
from luffy.plan.result import PlanError
from luffy.plan.topology import FEMTOSECONDS_PER_SECOND, Topology
from luffy.plan.trace import TraceStep, first_mentions
from luffy.plan.traffic import sum_by_rank
from luffy.seats.predictor import RowPredictor

ROUNDS = 3
Homes = list[tuple[np.ndarray, np.ndarray]]  # by layer: before and after it, [sequences of all steps]


@dataclass(frozen=True, eq=False)
class MappingPlan:
    """owners [layers, E]. num_bytes, present_num_bytes: token bytes of one step, forward and backward, by link class
    (local, intra-node, inter-node), with the new mapping and with the present one, counted on steps held out from the
    search. seconds, present_seconds: that the busiest rank of each exchange of such a step keeps its link busy, summed.
    move_num_bytes: of moving the experts, once; move_seconds likewise. pays: moving is worth it.
    """

    owners: np.ndarray
    num_bytes: tuple[int, int, int]
    present_num_bytes: tuple[int, int, int]
    move_num_bytes: tuple[int, int, int]
    num_moved: int
    pays: bool
    seconds: float = 0.0
    present_seconds: float = 0.0
    move_seconds: float = 0.0

    def check(self, ranks: int) -> None:
        """Raise PlanError unless every rank owns equally many experts of every layer."""
        layers, E = self.owners.shape
        for layer in range(layers):
            held = np.bincount(self.owners[layer], minlength=ranks)
            if len(held) != ranks or (held != E // ranks).any():
                raise PlanError(f"mapping: layer {layer} gives ranks {held.tolist()} experts, not {E // ranks} each")


def plan_mapping(
    fit: Sequence[TraceStep],
    held_out: Sequence[TraceStep],
    owners: np.ndarray,
    wire: Wire,
    expert_num_bytes: int,
    steps_until_next: int,
    micro_batches: int = 1,
    load_slack: float | None = RehomingProblem.load_slack,
) -> MappingPlan:
    """Search a better mapping than `owners` [layers, E]. Deterministic: every rank gets the same from the same steps.

    expert_num_bytes: weights and optimizer state of one expert. micro_batches: recorded steps are micro-batches, of
    which a training step has so many. load_slack: see RehomingProblem. Raises ValueError without steps.
    """
    if not fit or not held_out:
        raise ValueError("a mapping needs recorded steps, to fit and to judge")
    layers, E = owners.shape
    by_expert = [np.concatenate([s.counts_by_expert(layer, E) for s in fit]) for layer in range(layers)]
    together = [np.sum([_coactivation(s, layer, E) for s in fit], axis=0) for layer in range(layers)]

    def remap(homes: Homes, present: np.ndarray) -> np.ndarray:
        return np.stack(
            [_remap_layer(by_expert[i], together[i], homes[i], present[i], wire, load_slack) for i in range(layers)]
        )

    known = wire if wire.seats == "as-read" else replace(wire, seats="known")
    replays = [replay_step(s, owners, known) for s in fit]
    best, best_cost = owners, _busiest(replays, known)
    for start in _starts(_join(replays)):
        mapping, homes = owners, start
        for _ in range(ROUNDS):
            before, mapping = mapping, remap(homes, mapping)
            if homes is not start and (mapping == before).all():
                break  # homes follow from the mapping: every further round would be this one
            replays = [replay_step(s, mapping, known) for s in fit]
            cost = _busiest(replays, known)
            if cost < best_cost:
                best, best_cost = mapping, cost
            homes = _join(replays)

    judged = [_judge(fit, held_out, m, wire) for m in (owners, best)]
    per_step = micro_batches / len(held_out)
    present, predicted = (_scale(_total(r), per_step) for r, _ in judged)
    now, then = (round(cost * per_step) for _, cost in judged)
    moves = [_between(owners[i], best[i], wire.topology.world_size) for i in range(layers)]
    crossing = np.bincount(wire.topology.link_class_matrix()[owners, best].ravel(), minlength=3) * expert_num_bytes
    move = sum(_busiest_link(m, wire.topology) for m in moves) * expert_num_bytes
    return MappingPlan(
        best,
        predicted,
        present,
        (0, int(crossing[1]), int(crossing[2])),
        int(np.count_nonzero(best != owners)),
        bool((now - then) * steps_until_next > move),
        then / FEMTOSECONDS_PER_SECOND,
        now / FEMTOSECONDS_PER_SECOND,
        move / FEMTOSECONDS_PER_SECOND,
    )


def learn_rows(steps: Sequence[TraceStep], owners: np.ndarray, wire: Wire) -> RowPredictor | None:
    """A predictor of the rows that sequences send to each rank, fitted to recorded steps with experts at `owners`
    [layers, E]; None where steps have no features, or there is none."""
    predictor = RowPredictor(wire.topology.world_size)
    for step in steps:
        if step.features is not None:
            rows = rows_of_all_layers(step, owners, wire.topology.world_size, wire.copies)
            predictor.observe(step.features, step.lengths, rows)
    return predictor if predictor.solve() else None


def _judge(
    fit: Sequence[TraceStep], held_out: Sequence[TraceStep], owners: np.ndarray, wire: Wire
) -> tuple[list[list[LayerReplay]], int]:
    """Replays of the steps held out, and what they cost."""
    if wire.seats == "predicted":
        wire = replace(wire, predictor=learn_rows(fit, owners, wire))
    replays = [replay_step(s, owners, wire) for s in held_out]
    return replays, _busiest(replays, wire)


def _busiest(replays: Sequence[list[LayerReplay]], wire: Wire) -> int:
    """Femtoseconds that the busiest rank of each exchange keeps its link busy, summed, forward and backward."""
    sizes, topology, total = wire.sizes, wire.topology, 0
    there, back = sizes.dispatch + sizes.dispatch_backward, sizes.combine + sizes.combine_backward
    for layer in (layer for r in replays for layer in r):
        for homes, num_bytes in ((layer.homes_before, there), (layer.homes_after, back)):
            between = sum_by_rank(layer.problem.counts, homes, topology.world_size)
            total += _busiest_link(between, topology) * num_bytes
    return total


def _busiest_link(between: np.ndarray, topology: Topology) -> int:
    """Femtoseconds a byte of each row takes, in the busiest direction of the busiest rank. between [N, N]: rows from
    each rank to each."""
    weighed = between * topology.weight_matrix()
    return int(max(weighed.sum(0).max(), weighed.sum(1).max()))


def _between(before: np.ndarray, after: np.ndarray, num_ranks: int) -> np.ndarray:
    """int64 [N, N]: experts by the rank they leave and the rank they go to."""
    return np.bincount(before * num_ranks + after, minlength=num_ranks**2).reshape(num_ranks, num_ranks)


def _remap_layer(
    by_expert: np.ndarray,
    together: np.ndarray,
    homes: tuple[np.ndarray, np.ndarray],
    owner: np.ndarray,
    wire: Wire,
    load_slack: float | None,
) -> np.ndarray:
    """One layer's owners [E] for given homes: dispatch counts from where sequences come, combine to where they go."""
    before, after = (sum_by_rank(by_expert, side, wire.topology.world_size) for side in homes)
    problem = RehomingProblem(
        affinity=before + after,
        coactivation=2 * together,
        owner=owner,
        topology=wire.topology,
        row_num_bytes=wire.row_num_bytes,
        expert_num_bytes=0,
        passes=2,
        load_slack=load_slack,
    )
    return plan_rehoming(problem).new_owner


def _starts(homes: Homes) -> list[Homes]:
    """Homes to begin from: as they are; and those that a layer (first, middle, last) leaves, for all layers."""
    picked = sorted({0, len(homes) // 2, len(homes) - 1})
    starts = [homes, *([(homes[i][1], homes[i][1])] * len(homes) for i in picked)]

    def alike(a: Homes, b: Homes) -> bool:
        return all(np.array_equal(x, y) for pair in zip(a, b, strict=True) for x, y in zip(*pair, strict=True))

    return [s for i, s in enumerate(starts) if not any(alike(s, earlier) for earlier in starts[:i])]


def _coactivation(step: TraceStep, layer: int, num_experts: int) -> np.ndarray:
    """int64 [E, E]: tokens that chose both. Counted pair by pair: a product of memberships would take T E^2."""
    ids, first = step.chosen[layer].astype(np.int64), first_mentions(step.chosen[layer])
    both = np.zeros(num_experts**2, dtype=np.int64)
    for a in range(ids.shape[1]):
        for b in range(a):
            counted = first[:, a] & first[:, b]
            both += np.bincount(ids[counted, a] * num_experts + ids[counted, b], minlength=num_experts**2)
    table = both.reshape(num_experts, num_experts)
    return table + table.T


def _join(replays: Sequence[list[LayerReplay]]) -> Homes:
    layers = len(replays[0])
    return [
        (
            np.concatenate([r[layer].homes_before for r in replays]),
            np.concatenate([r[layer].homes_after for r in replays]),
        )
        for layer in range(layers)
    ]


def _total(replays: Sequence[list[LayerReplay]]) -> tuple[int, int, int]:
    """Bytes of rows by link class, forward and backward."""
    sums = [0, 0, 0]
    for layer in (layer for r in replays for layer in r):
        for c in range(3):
            sums[c] += layer.dispatch[c] + layer.combine[c] + layer.dispatch_backward[c] + layer.combine_backward[c]
    return sums[0], sums[1], sums[2]


def _scale(num_bytes: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    return round(num_bytes[0] * factor), round(num_bytes[1] * factor), round(num_bytes[2] * factor)
