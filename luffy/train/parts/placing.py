"""Placing experts: every few hundred steps some sequences are recorded, and experts move if that pays.

The next sequences that the loader will give are run forward once without gradient, so the decision is a function of
the weights and the step alone: a run resumed from a checkpoint makes the same one. See luffy.train.rehoming.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from luffy.comm import Comm
from luffy.model.stack import MicroBatch, Stack
from luffy.plan.trace import TraceStep
from luffy.seats.seater import LearntSeats
from luffy.train.parts import Done, Stateless
from luffy.train.rehoming import (
    Rehomed,
    current_owners,
    is_due,
    learn_seats,
    num_recorded,
    rehome,
    steps_until_next,
)
from luffy.train.seating import StepReader


class Placing(Stateless):
    """read(i): the i-th micro-batch from a step on, as every rank reads its own. every: steps between re-homings.

    trained: whether the weights were trained before step 0; routers that never were have no home.
    """

    name = "placing"

    def __init__(
        self,
        model: Stack,
        optimizer: torch.optim.Optimizer,
        read: Callable[[int, int], MicroBatch],
        *,
        every: int,
        steps: int,
        trained: bool,
        padded: bool,
        num_micro_batches: int,
        sequences_each: int,
        seats: LearntSeats | None = None,
        reader: StepReader | None = None,
    ) -> None:
        self.model, self.optimizer, self.read, self.seats, self.reader = model, optimizer, read, seats, reader
        self.every, self.steps, self.trained, self.padded = every, steps, trained, padded
        self.num_micro_batches, self.sequences_each = num_micro_batches, sequences_each
        self.last: Rehomed | None = None
        self.first: int | None = None  # step of this process

    @property
    def comm(self) -> Comm:
        return self.model.runtime.comm

    @torch.no_grad()
    def before(self, step: int) -> None:
        self.first = step if self.first is None else self.first
        self.last = None
        due = is_due(step, self.every) or (step == 0 and self.trained and self.every > 0)
        # Trained routers, and nothing known of them: resumed at another number of ranks, or begun from weights.
        unknown = self.seats is not None and not self.seats.is_fitted and (step > 0 or self.trained)
        unknown = unknown and step == self.first
        if self.comm.mesh.ep_size == 1 or not self.model.moe_layers or not (due or unknown):
            return
        with self.comm.meter.charging("experts"):
            number = num_recorded(self.sequences_each, self.model.config.router.num_experts)
            recorded = [self._record(step, m) for m in range(number)]
            if due:
                until_next = steps_until_next(step, self.every, self.steps)
                self.last = rehome(
                    self.model, self.optimizer, recorded, padded=self.padded, micro_batches=self.num_micro_batches,
                    steps_until_next=until_next, seats=self.seats,
                )  # fmt: skip
            elif self.seats is not None:
                copies = self.model.runtime.recipe.copies
                learn_seats(self.seats, recorded, current_owners(self.model), self.comm, copies)
        self.model.runtime.tally.take()  # the recording's rows are not the step's
        if self.reader is not None:
            self.reader.decide_anew()

    def _record(self, step: int, index: int) -> TraceStep:
        micro, recorder = self.read(step, index), self.model.runtime.recorder
        recorder.active = True
        self.model(micro)
        return recorder.finish(self.comm, step, micro.tokens)

    def after(self, step: int, done: Done) -> None:
        if self.last is not None:
            done.record["rehoming"], done.plain = self.last.to_dict(), False
