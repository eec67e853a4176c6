"""Routing traces: one file every few steps, for `luffy plan` and the benchmarks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from luffy.comm import Mesh
from luffy.model.stack import Stack
from luffy.plan.trace import RoutingTrace
from luffy.train.parts import Done, Stateless
from luffy.train.rehoming import current_owners, wire_of


class Tracing(Stateless):
    """Writes what was recorded to OUT/trace, by the first rank, of its EP group's micro-batches."""

    name = "tracing"

    def __init__(self, model: Stack, mesh: Mesh, every: int, folder: Path, padded: bool, about: dict[str, Any]) -> None:
        self.model, self.mesh, self.every, self.folder = model, mesh, every, folder
        self.padded, self.about = padded, about

    def records(self, step: int) -> bool:
        return bool(self.every) and (step + 1) % self.every == 0

    def after(self, step: int, done: Done) -> None:
        if not (self.records(step) and self.mesh.rank == 0):
            return
        router, wire = self.model.config.router, wire_of(self.model, self.padded)
        trace = RoutingTrace(
            tuple(done.traced),
            num_experts=router.num_experts,
            top_k=router.top_k,
            hidden_size=self.model.config.row_size,
            row_num_bytes=wire.row_num_bytes,
            owners=current_owners(self.model),
            about=self.about | {"expert_num_bytes": wire.expert_num_bytes},
        )
        trace.save(self.folder / f"step-{step + 1:08d}.npz")
