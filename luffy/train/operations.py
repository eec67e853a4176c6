"""What an operator relies on, as the trainer sees it: one object to ask once a step.

It brings together the guard against bad steps, requests to stop, checkpoints under way, the heartbeat and stragglers.
What ranks must agree on travels as a few numbers in the all-reduce that a step makes anyway (`notes`).
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor, nn

from luffy.comm import Mesh
from luffy.errors import StoppedError
from luffy.train import heartbeat, stopping
from luffy.train.checkpoint import CheckpointWriter
from luffy.train.guard import StepGuard
from luffy.train.options import TrainOptions
from luffy.train.ranklog import say
from luffy.train.stragglers import Stragglers, busy_seconds


class Operations:
    """One rank's. Every rank makes one, and calls its methods at the same steps."""

    def __init__(self, options: TrainOptions, model: nn.Module, mesh: Mesh) -> None:
        self.mesh, self.keep = mesh, options.keep_checkpoints
        self.guard = StepGuard(model, mesh, options.skip_bad_steps)
        self.writer = CheckpointWriter(
            Path(options.out) / "checkpoints", mesh, options.keep_checkpoints, options.async_checkpoints
        )
        self.stragglers = Stragglers()
        self.stops = False  # all ranks know that somebody asked for it
        self.warning: str | None = None
        self._busy = 0.0

    def begin_step(self, step: int) -> None:
        heartbeat.at_step(step)

    def notes(self, split: Mapping[str, float]) -> np.ndarray:
        """What this rank adds to the sum over ranks: [asked to stop, checkpoint failed, seconds of each rank]."""
        mine = np.zeros(2 + self.mesh.world_size)
        mine[0] = bool(stopping.requested())
        mine[1] = self.writer.has_failed()
        mine[2 + self.mesh.rank] = busy_seconds(split)
        return mine

    def read(self, notes: Sequence[float], split: Mapping[str, float]) -> dict[str, Any]:
        """Act on the sum of all ranks' notes; what the record says. Raises UserError where a checkpoint failed."""
        self.stops = notes[0] > 0
        if notes[1] > 0:
            self.writer.finish()
        entry, self.warning = self.stragglers.read(notes[2:], sum(split.values()))
        if self.warning:
            say(self.warning)
        return entry

    def save(
        self,
        step: int,
        state: dict[str, Any],
        meta: dict[str, Any],
        optimizer: torch.optim.Optimizer,
        measure: Callable[[], float],
        tensors: dict[str, Tensor] | None = None,
    ) -> None:
        """Begin a checkpoint, unless none are kept. Raises UserError where the state is not fit to be saved.

        measure: a loss that the weights give now, the same on all ranks.
        """
        self.guard.check_state(step, optimizer, measure)
        if self.keep:
            self.writer.save(step, state, meta | {"skipped_steps": self.guard.skipped}, tensors)

    def stop(self, step: int) -> NoReturn:
        """End the run after a step that is being saved."""
        self.writer.finish()
        number = stopping.requested() or signal.SIGTERM
        saved = "which is saved; add --resume to continue" if self.keep else "and not saved (--keep-checkpoints 0)"
        raise StoppedError(number, f"stopped by {stopping.name_of(number)} after step {step}, {saved}")
