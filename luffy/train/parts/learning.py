"""Learning where sequences should sit: rows that layers count, gathered into a predictor that is refreshed.

Each rank notes the rows of its own sequences to each rank; at a refresh all ranks add up what they noted, and rank 0
solves for all (luffy.seats.sharing). From then on seats are decided by the new predictor.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from luffy.comm import Comm
from luffy.compose import Runtime
from luffy.data.batch import Layout
from luffy.seats.features import features_of
from luffy.seats.seater import LearntSeats
from luffy.seats.sharing import OBSERVE_EVERY, learn_together, load_shared, refreshes_after, shared_state
from luffy.train.parts import Done, Stateless
from luffy.train.seating import StepReader


class SeatLearning(Stateless):
    """Keeps the predictor of `seats` up to date."""

    name = "seats"

    def __init__(self, seats: LearntSeats, reader: StepReader, runtime: Runtime, comm: Comm) -> None:
        self.seats, self.reader, self.runtime, self.comm = seats, reader, runtime, comm
        self.seen = seats.seen  # whoever moves experts makes it forget

    def before(self, step: int) -> None:
        if step % OBSERVE_EVERY == 0 and self.comm.mesh.ep_size > 1:
            self.runtime.observed = []

    def after(self, step: int, done: Done) -> None:
        noted, self.runtime.observed = self.runtime.observed, None
        if noted and done.seated is not None:
            self._observe(noted, done)
        if not refreshes_after(step) or self.comm.mesh.ep_size == 1:
            return
        with self.comm.meter.charging("control"):
            learnt = learn_together(self.seats.predictor, self.seen, self.comm)
        if learnt:
            self.reader.decide_anew()

    def _observe(self, noted: list[tuple[Layout, torch.Tensor]], done: Done) -> None:
        """noted: rows [S, N] of one layer's local sequences to each rank, beside how these lie."""
        assert done.seated is not None
        for layout, sequences in zip(done.layouts, done.seated.micro_batches, strict=True):
            by_layer = [rows for where, rows in noted if where is layout]
            if by_layer and sequences:
                rows = torch.stack(by_layer).sum(0).cpu().numpy()
                self.seen.observe(features_of([s.tokens for s in sequences]), np.array(layout.lengths), rows)

    def state(self) -> dict[str, Any]:
        return shared_state(self.seats, self.comm)

    def load(self, state: dict[str, Any]) -> None:
        load_shared(self.seats, state, self.comm)
