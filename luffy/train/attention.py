"""The cost of attention that a run plans with: measured at its start, the same on all ranks, kept in its checkpoints.

Every rank measures (luffy.model.profile), since ranks that share a machine slow each other down and that is what a step
will meet. All of them then plan with the fit of the rank in the middle: nobody averages floats, so nobody disagrees.

Placement changes the order of summation, so a plan made with another measurement would change the last bits of a loss.
Therefore a resumed run goes on with the fit in its checkpoint, unless the device is another one. Two runs from the
start measure twice, and where that changes a plan their losses agree to rounding only; `--no-profile-attention` plans
by the paper's formula as it stands, and repeats bit for bit on one machine.

Only strategies that weigh attention, on batches of uneven lengths, can depend on any of this; others measure nothing.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import click
import numpy as np
import torch

from luffy.comm import Comm
from luffy.config import ModelConfig
from luffy.model import Runtime
from luffy.model.profile import AttentionProfile, profile_attention
from luffy.plan.cost import SCORE_COST_ONE, AttentionCost
from luffy.plan.placement import WEIGHS_ATTENTION
from luffy.train.metrics import describe_machine
from luffy.train.options import TrainOptions
from luffy.train.progress import phase

BUDGET_SECONDS = 0.6
TOKENS = (1024, 16384)  # the largest batch measured is what a rank holds, but within these


@dataclass(frozen=True)
class AttentionFit:
    """A fit for people, files and planning. Errors are relative: of the batches fitted, and of those held back.

    device_name: of rank 0. Errors are None where nothing was measured: with num_samples 0, this is the paper's formula.
    """

    device_name: str
    layout: str
    flops_per_second: float
    overhead_seconds: float
    score_cost: int = SCORE_COST_ONE
    num_samples: int = 0
    median_relative_error: float | None = None
    max_relative_error: float | None = None
    padded_median_relative_error: float | None = None
    padded_max_relative_error: float | None = None
    packed_median_relative_error: float | None = None
    packed_max_relative_error: float | None = None

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> AttentionFit:
        return cls(**{f.name: data[f.name] for f in fields(cls)})

    def attention_cost(self, hidden_size: int) -> AttentionCost:
        return AttentionCost(hidden_size, self.flops_per_second, self.score_cost)


_NUMBERS = [f.name for f in fields(AttentionFit)][2:]


def plans_weigh_attention(options: TrainOptions, ep_size: int) -> bool:
    """Whether any plan of this run can depend on what attention costs."""
    placement = options.get_recipe().placement
    return ep_size > 1 and placement in WEIGHS_ATTENTION and options.sequence_mode == "documents"


def attention_for_planning(
    options: TrainOptions, config: ModelConfig, runtime: Runtime, dtype: torch.dtype, stored: AttentionFit | None
) -> AttentionFit | None:
    """Give the planner its cost of attention: `stored` if it is of this device and layout, else measured now.

    All ranks call it, with the same `stored`. None where it would change nothing or was not wanted: the planner then
    keeps the paper's formula.
    """
    comm, mesh = runtime.comm, runtime.comm.mesh
    if runtime.planner is None or not options.profile_attention or not plans_weigh_attention(options, mesh.ep_size):
        return None
    device_name = describe_machine(mesh.device.type)["device_name"]
    known = stored is not None and (stored.device_name, stored.layout) == (device_name, options.layout)
    # Rank 0 decides for all, as it did when this was measured.
    reused = comm.all_reduce(torch.tensor(int(known and mesh.rank == 0), device=mesh.device))
    if stored is not None and int(reused):
        fit = stored
    else:
        with phase("profile attention", enabled=mesh.rank == 0):
            longest = options.sequence_length or config.max_sequence_length
            share = options.batch_size // (options.num_micro_batches * mesh.world_size)
            profile: AttentionProfile | None = None
            # Too much else may go on for times to mean anything; another rank may fare better.
            with contextlib.suppress(ValueError):
                profile = profile_attention(
                    config,
                    mesh.device,
                    dtype,
                    longest=longest,
                    max_tokens=min(max(share * longest, TOKENS[0]), TOKENS[1]),
                    padded=options.layout == "padded",
                    budget_seconds=BUDGET_SECONDS,
                )
            fit = agree(profile, comm, device_name, options.layout)
        if fit.num_samples == 0 and mesh.rank == 0:
            click.echo(
                "attention's times did not grow with the work (is the device busy?): planning by the paper's formula",
                err=True,
            )
    runtime.planner.attention = fit.attention_cost(config.hidden_size)
    comm.meter.take()  # agreeing is not part of a step's traffic
    return fit


def agree(profile: AttentionProfile | None, comm: Comm, device_name: str, layout: str) -> AttentionFit:
    """The fit of the rank whose rate is in the middle, on every rank of the world; the formula if no rank has one."""
    mine = np.full(len(_NUMBERS), np.nan)
    if profile is not None:
        own = summarise(profile, device_name, layout).to_dict()
        mine = np.array([math.nan if own[name] is None else own[name] for name in _NUMBERS], dtype=np.float64)
    rows = comm.all_gather_world(torch.from_numpy(mine).to(comm.mesh.device)).tolist()
    measured = sorted((row[0], rank) for rank, row in enumerate(rows) if not math.isnan(row[0]))
    if not measured:
        return AttentionFit(device_name, layout, AttentionCost().flops_per_second, 0.0)
    chosen = dict(zip(_NUMBERS, rows[measured[len(measured) // 2][1]], strict=True))
    numbers: dict[str, Any] = {name: None if math.isnan(x) else x for name, x in chosen.items()}
    numbers |= {name: int(chosen[name]) for name in ("score_cost", "num_samples")}
    return AttentionFit(device_name, layout, **numbers)


def summarise(profile: AttentionProfile, device_name: str, layout: str) -> AttentionFit:
    fit = profile.fit

    def middle_and_most(errors: Sequence[float]) -> tuple[float | None, float | None]:
        return (float(np.median(errors)), max(errors)) if errors else (None, None)

    return AttentionFit(
        device_name,
        layout,
        fit.flops_per_second,
        fit.overhead_seconds,
        fit.score_cost,
        fit.num_samples,
        fit.median_relative_error,
        fit.max_relative_error,
        *middle_and_most(profile.check_errors(padded=True)),
        *middle_and_most(profile.check_errors(padded=False)),
    )
