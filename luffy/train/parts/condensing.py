"""Condensation over a run: when it is on, and the paper's threshold, which follows the loss."""

from __future__ import annotations

import math
from typing import Any

from luffy.exchange.condense import CondenseState
from luffy.plan.condensation import paper_threshold
from luffy.train.parts import Done, Stateless


class Condensing(Stateless):
    """Sets `state` before each step. warmup: steps before condensation begins; until: share of the run's `steps` after
    which it ends."""

    name = "condensing"

    def __init__(self, state: CondenseState, warmup: int, until: float, steps: int) -> None:
        self.condense, self.warmup, self.until, self.steps = state, warmup, until, steps
        self.initial_loss: float | None = None
        self.loss: float | None = None

    def before(self, step: int) -> None:
        state = self.condense
        state.on = self.warmup <= step < math.ceil(self.until * self.steps)
        if state.scheme.policy == "paper" and self.initial_loss is not None and self.loss is not None:
            state.thresholds = [paper_threshold(self.initial_loss, self.loss)] * len(state.thresholds)

    def after(self, step: int, done: Done) -> None:
        if done.routers is None or done.skipped:
            return
        loss = done.record["loss"]
        self.initial_loss, self.loss = self.initial_loss or loss, loss
        if not self.condense.on:
            done.record["condense"] = {"kept": 1.0}
            return
        rows = done.routers.condensed.double().tolist()
        record: dict[str, Any] = {"kept": sum(r[1] for r in rows) / max(1.0, sum(r[0] for r in rows))}
        for i, (copies, sent) in enumerate(rows):
            layer = {"kept": sent / max(1.0, copies), "threshold": self.condense.thresholds[i]}
            record[f"layer_{i:02d}"] = {key: round(value, 6) for key, value in layer.items()}
        done.record["condense"] = record

    def state(self) -> dict[str, Any]:
        return {"initial_loss": self.initial_loss, "loss": self.loss}

    def load(self, state: dict[str, Any]) -> None:
        self.initial_loss, self.loss = state.get("initial_loss"), state.get("loss")
