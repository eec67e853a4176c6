"""Expert re-homing in training: record a few micro-batches, plan, and move experts if that pays; learn seats besides.

What is recorded are the *next* sequences that the loader will give, run forward once without gradient. So the decision
is a function of the weights and the step alone: a run resumed from a checkpoint makes the same one. Everything that
re-homing sends, the recording included, is counted under `experts`.

Experts are placed together with seats of sequences (luffy.plan.mapping). The predictor of seats is then fitted to the
same recordings, with experts where they now are; what it knew of experts elsewhere is forgotten. Routers move fast in
the beginning, hence the first times at an eighth, a quarter and a half of `rehome_every`.

An expert moves as rows of its stacked parameters and of the optimizer's two moments, bit by bit, in one all-to-all a
layer; afterwards `slot_of_expert` says where it is. Checkpoints hold experts by slot together with that map.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm, RowExchange, all_to_all_rows
from luffy.errors import RankMismatchError
from luffy.model.moe_layer import MoELayer
from luffy.model.stack import Stack
from luffy.plan.cost import AttentionCost
from luffy.plan.mapping import MappingPlan, plan_mapping
from luffy.plan.replay import Wire, rows_of_all_layers
from luffy.plan.trace import TraceStep
from luffy.seats.predictor import RowPredictor
from luffy.seats.seater import LearntSeats
from luffy.seats.sharing import learn_together

MOST_RECORDED = 6  # micro-batches: half to fit, half to judge
EARLY = (8, 4, 2)  # the first re-homings, at these fractions of `rehome_every`


def is_due(step: int, every: int) -> bool:
    """Whether experts are re-homed before step `step`, counted from 0; every: `rehome_every`, 0 for never."""
    return every > 0 and step > 0 and (step % every == 0 or step in {every // n for n in EARLY})


def steps_until_next(step: int, every: int, steps: int) -> int:
    """Steps of a run of `steps` from step `step` until experts are re-homed again, or the run ends."""
    return next((s for s in range(step + 1, steps) if is_due(s, every)), steps) - step


def num_recorded(sequences: int, num_experts: int) -> int:
    """Micro-batches of so many sequences to record: to fit by, 128 sequences or eight for each expert are enough."""
    enough = -(-max(128, 8 * num_experts) // max(1, sequences))
    return min(MOST_RECORDED, 2 * enough)


@dataclass(frozen=True)
class Rehomed:
    """What one re-homing came to; bytes are of all ranks. `pays` false: nothing was moved.

    present_seconds, predicted_seconds: that the busiest rank of each exchange of a step keeps its link busy, summed,
    by which it is judged. learnt: seats were learnt besides. seconds: that all of it took, but for the recording.
    """

    pays: bool
    num_moved: int
    move_num_bytes: int
    present_num_bytes_per_step: int
    predicted_num_bytes_per_step: int
    present_seconds_per_step: float
    predicted_seconds_per_step: float
    learnt: bool
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def current_owners(model: Stack) -> np.ndarray:
    """int64 [MoE layers, E]: the EP rank of each expert."""
    return np.stack([(m.slot_of_expert // m.experts.num_local).cpu().numpy() for m in model.moe_layers])


def wire_of(model: Stack, padded: bool) -> Wire:
    """How this model's layers put rows on the wire now, as replay wants to know it."""
    rt, width = model.runtime, model.config.row_size
    recipe, itemsize, state = rt.recipe, model.stream_dtype.itemsize, rt.residency
    size = sum(p[0].numel() for p in model.moe_layers[0].experts.parameters()) if model.moe_layers else 0
    coded = [t.spec for t in rt.transports[:1] if t.codes]
    return Wire(
        topology=rt.topology,
        row_num_bytes=width * itemsize,
        row_bytes=coded[0].row_bytes(width, itemsize) if coded else None,
        strategy=recipe.placement,
        look_ahead="router" if recipe.look_ahead else "none",
        copies=recipe.copies,
        attention=AttentionCost(width) if rt.planner is None else rt.planner.attention,
        padded=padded,
        residency="static" if state is None else recipe.residency,
        expert_num_bytes=size * itemsize,
        expert_costs=None if state is None else state.costs(width, size, itemsize),
        seats="predicted" if recipe.seats == "learnt" else "as-read",
    )


def rehome(
    model: Stack,
    optimizer: torch.optim.Optimizer,
    recorded: list[TraceStep],
    *,
    padded: bool,
    micro_batches: int,
    steps_until_next: int,
    seats: LearntSeats | None = None,
) -> Rehomed:
    """Plan from `recorded`, move experts where it pays, and fit the predictor of `seats`; every rank takes part.

    recorded: micro-batches, an even number, the same on all ranks of an EP group. seats: whose seats sequences take,
    None where they are computed as read. Raises RankMismatchError where ranks of the first EP group planned
    differently.
    """
    begin = time.perf_counter()
    comm = model.runtime.comm
    owners, wire = current_owners(model), wire_of(model, padded)
    half = len(recorded) // 2
    plan = plan_mapping(
        recorded[:half],
        recorded[half:],
        owners,
        wire,
        expert_num_bytes=_expert_num_bytes(model, optimizer),
        steps_until_next=steps_until_next,
        micro_batches=micro_batches,
    )
    plan.check(comm.mesh.ep_size)
    decided = _agree(plan, owners, comm)
    moves = bool((decided != owners).any())
    if moves:
        for layer, moe in enumerate(model.moe_layers):
            if (decided[layer] != owners[layer]).any():
                move_experts(moe, optimizer, decided[layer], comm)
    learnt = seats is not None and learn_seats(seats, recorded, decided, comm, wire.copies, anew=moves)
    dp = comm.mesh.dp_size
    return Rehomed(
        pays=moves,
        num_moved=int((decided != owners).sum()),
        move_num_bytes=sum(plan.move_num_bytes) * dp,
        present_num_bytes_per_step=sum(plan.present_num_bytes[1:]) * dp,
        predicted_num_bytes_per_step=sum(plan.num_bytes[1:]) * dp,
        present_seconds_per_step=plan.present_seconds,
        predicted_seconds_per_step=plan.seconds,
        learnt=learnt,
        seconds=time.perf_counter() - begin,
    )


def learn_seats(
    seats: LearntSeats,
    recorded: list[TraceStep],
    owners: np.ndarray,
    comm: Comm,
    copies: str = "ranks",
    *,
    anew: bool = True,
) -> bool:
    """Fit the predictor of `seats` to recorded micro-batches, with experts at `owners` [MoE layers, E]; whether there
    was anything to learn from. Every rank of the world calls it.

    anew: what it has seen before is of experts elsewhere, or there is nothing. This alone is enough for a trained model
    that has no predictor: one that was resumed at another number of ranks, or whose weights are those of another run.
    """
    mesh, seen = comm.mesh, RowPredictor(comm.mesh.ep_size)
    for step in recorded:
        if step.features is None:
            continue
        # The ranks of an EP group recorded the same sequences: each takes its share of them.
        mine = np.arange(len(step.lengths)) % mesh.ep_size == mesh.ep_rank
        rows = rows_of_all_layers(step, owners, mesh.ep_size, copies)
        seen.observe(step.features[mine], step.lengths[mine], rows[mine])
    if anew:
        seats.forget()
    return learn_together(seats.predictor, seen, comm, "experts")


def _agree(plan: MappingPlan, owners: np.ndarray, comm: Comm) -> np.ndarray:
    """Where experts are to be, as the first EP group decided, on every rank; its groups are copies and must agree.

    Its ranks must have planned the same mapping, in integers. Whether that pays is the first rank's word: it depends on
    a predictor, which unlike processors fit with unlike rounding.
    """
    mesh = comm.mesh
    mine = torch.from_numpy(np.append(plan.owners.ravel(), int(plan.pays))).to(mesh.device)
    everyone = comm.all_gather_world(mine).cpu().numpy()
    first = everyone[0, :-1]
    odd = [r for r in range(mesh.ep_size) if (everyone[r, :-1] != first).any()]
    if odd:
        raise RankMismatchError(f"re-homing: ranks {odd} planned another mapping of experts than rank 0; none moved")
    return first.reshape(owners.shape) if everyone[0, -1] else owners


def _stacked(moe: MoELayer, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All tensors of a layer that have one row for each local expert: parameters and optimizer moments."""
    for p in moe.experts.parameters():
        yield p.detach()  # shares its version: whoever keeps something made of a weight sees that it changed
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                yield value


def _expert_num_bytes(model: Stack, optimizer: torch.optim.Optimizer) -> int:
    first = model.moe_layers[0]
    return sum(t[0].nbytes for t in _stacked(first, optimizer))


@torch.no_grad()
def move_experts(moe: MoELayer, optimizer: torch.optim.Optimizer, owner: np.ndarray, comm: Comm) -> None:
    """Give expert e of this layer to EP rank owner[e], with its optimizer state; bit by bit.

    Raises ValueError where a rank would not keep its number of experts.
    """
    mesh, n = comm.mesh, moe.experts.num_local
    if (np.bincount(owner, minlength=mesh.ep_size) != n).any():
        raise ValueError(f"every rank keeps {n} experts of a layer, not {np.bincount(owner).tolist()}")
    slot_before = moe.slot_of_expert.cpu().numpy()
    slot_after = np.empty_like(slot_before)
    slot_after[np.argsort(owner, kind="stable")] = np.arange(len(owner))
    # Both sides order rows by the new slot within each pair of ranks, so no order has to be sent.
    by_new_slot = np.argsort(slot_after)
    leaving = [e for e in by_new_slot if slot_before[e] // n == mesh.ep_rank]
    arriving = [e for e in by_new_slot if slot_after[e] // n == mesh.ep_rank]
    arriving.sort(key=lambda e: slot_before[e] // n)  # by source, stable: by new slot within

    def splits(experts: list[int], slots: np.ndarray) -> tuple[int, ...]:
        return tuple(np.bincount(slots[experts] // n, minlength=mesh.ep_size).tolist())

    exchange = RowExchange(comm, splits(leaving, slot_after), splits(arriving, slot_before))
    rows = torch.tensor([slot_before[e] % n for e in leaving], device=mesh.device)
    places = torch.tensor([slot_after[e] % n for e in arriving], device=mesh.device)
    tensors = list(_stacked(moe, optimizer))
    names = ("experts",) * len(tensors)
    arrived = all_to_all_rows([t[rows] for t in tensors], exchange, directions=names, backward_directions=names)
    for tensor, new in zip(tensors, arrived, strict=True):
        tensor[places] = new
    moe.slot_of_expert.copy_(torch.from_numpy(slot_after))
