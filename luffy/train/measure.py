"""What a step came to, on all ranks: loss, gradient norm, bytes, seconds, rows; the record for `metrics.jsonl`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luffy.comm.clock import PHASES
from luffy.comm.meter import DIRECTIONS, LINK_CLASSES, by_direction, by_link
from luffy.compose import Runtime
from luffy.exchange.tally import busiest_over_mean, rows_at_home
from luffy.model.aux_loss import RouterTotals
from luffy.train.operations import Operations
from luffy.train.over_ranks import over_ranks
from luffy.train.seating import SeatedStep

LOAD_EVERY = 10  # steps between records of the load of every expert of every layer


class Measure:
    """One rank's counts. `step` makes one record of what all ranks counted since the last, in one small all-reduce."""

    def __init__(self, runtime: Runtime, ops: Operations) -> None:
        self.runtime, self.comm, self.ops = runtime, runtime.comm, ops
        # Rows and experts sent to each rank since this process began: this rank's row of the traffic matrix.
        self.sent, self.sent_steps = np.zeros(self.comm.mesh.world_size, dtype=np.int64), 0

    def step(
        self,
        number: int,
        token_loss: Tensor,
        norm: Tensor,
        routers: RouterTotals | None,
        in_full: bool,
        forward_again: Callable[[], None],
        seated: SeatedStep,
    ) -> dict[str, Any]:
        """The record of step `number`, counted from 1. token_loss []: this rank's share; norm []: of all gradients.

        in_full: with what layers and experts did, one by one. forward_again: the step's forward pass once more, to find
        where a number that is not finite began. Raises UserError everywhere if there is one and the step is not to be
        skipped.
        """
        mesh = self.comm.mesh
        self.sent, self.sent_steps = self.sent + self.comm.meter.read_to_rank(), self.sent_steps + 1
        seconds, counts = self.runtime.clock.take(), self.comm.meter.take()
        # What was under way and not waited for; the phase includes packing rows, so this is what was hidden at least.
        under_way = self.comm.meter.take_under_way()
        hidden = max(0.0, under_way - seconds["exchange"])
        times = [under_way, hidden, seated.seconds, seated.exposed_seconds]
        mine = np.concatenate([[seconds[p] for p in PHASES], times, counts.reshape(-1)])
        notes = self.ops.notes(seconds)
        packed = torch.cat([token_loss[None], torch.from_numpy(np.concatenate([mine, notes])).to(mesh.device)])
        # The sum's own bytes belong to the next step: its counts are already on their way.
        every = self.comm.all_reduce(packed).tolist()
        values, grad_norm = every[: -len(notes)], float(norm)
        told = self.ops.read(every[-len(notes) :], seconds)
        if not self.ops.guard.passes(number, values[0], grad_norm, forward_again):
            told["skipped"] = self.ops.guard.skipped
        n = 1 + len(PHASES) + len(times)
        means = [v / mesh.world_size for v in values[1:n]]
        shape = (len(DIRECTIONS), len(LINK_CLASSES))
        traffic = np.array(values[n:]).round().astype(np.int64).reshape(shape)
        record: dict[str, Any] = {
            "loss": values[0],
            "grad_norm": grad_norm,
            "bytes": by_direction(traffic),
            "bytes_by_link": by_link(traffic),
            "seconds_split": dict(zip(PHASES, means, strict=False)),
            **told,
        }
        if means[-4] > 0:
            record["exchange_under_way_seconds"], record["exchange_hidden_seconds"] = means[-4:-2]
        if routers is not None:
            record |= routers.to_record(in_full)
        record |= self._rows(in_full) | self._residency() | self.plans(show=True)
        if seated.seating is not None:
            seats = {"rows_at_home": record.get("rows_at_home"), "moved_share": seated.moved_share}
            record["seats"] = seats | {"seconds": means[-2], "exposed_seconds": means[-1]}
        return record

    def _rows(self, in_full: bool) -> dict[str, Any]:
        """Rows of the first EP group's micro-batches: share that stays on its rank, and how uneven the rest is."""
        rows = self.runtime.tally.take()
        if not rows:
            return {}
        by_layer = rows_at_home(rows)
        out: dict[str, Any] = {"rows_at_home": sum(by_layer) / len(by_layer), "busiest_rank": busiest_over_mean(rows)}
        if in_full:
            out["rows_at_home_by_layer"] = [round(x, 5) for x in by_layer]
        return out

    def _residency(self) -> dict[str, Any]:
        """Experts of other ranks that were held."""
        if self.runtime.residency is None:
            return {}
        held = self.runtime.residency.take()
        seen = over_ranks(self.comm, {}, {"peak_num_bytes": held["peak_num_bytes"]}, {"guests": held["guests"]})
        return {"residency": {name: int(value) for name, value in seen.items()}}

    def plans(self, show: bool = False) -> dict[str, Any]:
        """What plans behind layers came to since the last call, mean over ranks; {} for recipes that make none."""
        planner, meter = self.runtime.planner, self.comm.meter
        exposed, meter.exposed_seconds = meter.exposed_seconds, 0.0
        if planner is None:
            return {}
        tally = planner.tally.take()
        if not show:
            return {}
        plan = {
            "moved_share": tally.moved / max(1, tally.sequences),
            "seconds": tally.seconds,
            "exposed_seconds": exposed,
            "wait_seconds": tally.wait_seconds,
        }
        seen = over_ranks(self.comm, plan, {"tokens_max_over_mean": tally.tokens_max_over_mean})
        return {"plan": {name: seen[name] for name in plan}, "tokens_max_over_mean": seen["tokens_max_over_mean"]}
