"""Expert re-homing in training: record a few micro-batches, plan, and move experts if that pays.

What is recorded are the *next* sequences that the loader will give, run forward once without gradient. So the decision
is a function of the weights and the step alone: a run resumed from a checkpoint makes the same one. Everything that
re-homing sends, the recording included, is counted under `experts`.

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
from luffy.model import Transformer
from luffy.model.moe_layer import MoELayer
from luffy.plan.cost import AttentionCost
from luffy.plan.mapping import MappingPlan, plan_mapping
from luffy.plan.replay import Wire
from luffy.plan.trace import TraceStep

MOST_RECORDED = 6  # micro-batches: half to fit, half to judge


def is_due(step: int, every: int) -> bool:
    """Whether experts are re-homed before step `step`: every so many steps, and at 1/8, 1/4 and 1/2 of the first."""
    return every > 0 and (step % every == 0 or (step < every and step in (every // 8, every // 4, every // 2)))


def num_recorded(sequences: int, num_experts: int) -> int:
    """Micro-batches of so many sequences to record: to fit by, 128 sequences or eight for each expert are enough."""
    enough = -(-max(128, 8 * num_experts) // max(1, sequences))
    return min(MOST_RECORDED, 2 * enough)


@dataclass(frozen=True)
class Rehomed:
    """What one re-homing came to; bytes are of all ranks. `pays` false: nothing was moved."""

    pays: bool
    num_moved: int
    move_num_bytes: int
    present_num_bytes_per_step: int
    predicted_num_bytes_per_step: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def current_owners(model: Transformer) -> np.ndarray:
    """int64 [MoE layers, E]: the EP rank of each expert."""
    return np.stack([(m.slot_of_expert // m.experts.num_local).cpu().numpy() for m in model.moe_layers])


def wire_of(model: Transformer, padded: bool) -> Wire:
    """How this model's layers put rows on the wire now, as replay wants to know it: under `auto`, in its mode at hand.

    Layers differ in residency at most.
    """
    rt, width = model.runtime, model.config.hidden_size
    recipe = rt.recipe
    size = sum(p[0].numel() for p in model.moe_layers[0].experts.parameters()) if model.moe_layers else 0
    itemsize, state = model.stream_dtype.itemsize, rt.residency
    return Wire(
        topology=rt.topology,
        row_num_bytes=width * itemsize,
        row_bytes=recipe.wire_spec.row_bytes(width, itemsize) if recipe.wire != "model" else None,
        strategy=recipe.placement,
        look_ahead="router" if recipe.look_ahead else "none",
        copies=recipe.copies,
        attention=AttentionCost(width) if rt.planner is None else rt.planner.attention,
        padded=padded,
        residency=recipe.residency,
        expert_num_bytes=size * itemsize,
        expert_costs=None if state is None else state.costs(width, size, itemsize),
    )


def rehome(
    model: Transformer,
    optimizer: torch.optim.Optimizer,
    recorded: list[TraceStep],
    *,
    padded: bool,
    micro_batches: int,
    steps_until_next: int,
    seats: Any = None,
) -> Rehomed:
    """Plan from `recorded` and move experts where it pays; every rank of the world takes part.

    Raises RankMismatchError where ranks of the first EP group planned differently.
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
    if (decided != owners).any():
        for layer, moe in enumerate(model.moe_layers):
            if (decided[layer] != owners[layer]).any():
                move_experts(moe, optimizer, decided[layer], comm)
    dp = comm.mesh.dp_size
    return Rehomed(
        pays=bool((decided != owners).any()),
        num_moved=int((decided != owners).sum()),
        move_num_bytes=sum(plan.move_num_bytes) * dp,
        present_num_bytes_per_step=sum(plan.present_num_bytes[1:]) * dp,
        predicted_num_bytes_per_step=sum(plan.num_bytes[1:]) * dp,
        seconds=time.perf_counter() - begin,
    )


def _agree(plan: MappingPlan, owners: np.ndarray, comm: Comm) -> np.ndarray:
    """The first EP group's decision, on every rank; the groups are copies and must keep the same mapping."""
    mesh = comm.mesh
    mine = torch.from_numpy(plan.owners if plan.pays else owners).to(mesh.device)
    everyone = comm.all_gather_world(mine).cpu().numpy()
    odd = [r for r in range(mesh.ep_size) if (everyone[r] != everyone[0]).any()]
    if odd:
        raise RankMismatchError(f"re-homing: ranks {odd} planned another mapping of experts than rank 0; none moved")
    return everyone[0]


def _stacked(moe: MoELayer, optimizer: torch.optim.Optimizer) -> Iterator[Tensor]:
    """All tensors of a layer that have one row for each local expert: parameters and optimizer moments."""
    for p in moe.experts.parameters():
        yield p.data
        for value in optimizer.state[p].values():
            if isinstance(value, Tensor) and value.shape == p.shape:
                yield value


def _expert_num_bytes(model: Transformer, optimizer: torch.optim.Optimizer) -> int:
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
