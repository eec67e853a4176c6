"""Condensation over a run: when it is on, and at which threshold.

`budget:E` holds each layer at a relative error E: what the audited copies of the steps so far say, weighted towards the
newest, moves the layer's threshold h. The error of an answer grows about as the square root of 1 - h, so 1 - h is
multiplied by (E / error)^2, by at most a quarter a step. Everything here follows from numbers that all ranks share, and
is kept in checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from luffy.exchange import CondenseState
from luffy.plan.condensation import paper_threshold
from luffy.train.options import TrainOptions

MEMORY = 0.9  # weight of what earlier steps measured
FASTEST = 1.25  # factor on 1 - h in one step
NARROWEST, WIDEST = 1e-4, 1.0  # of 1 - h


class CondenseControl:
    """Sets a CondenseState before each step, and learns from it after. `state` None: nothing to do."""

    def __init__(self, state: CondenseState | None, options: TrainOptions) -> None:
        self.state, self.options = state, options
        self.initial_loss: float | None = None
        self.loss: float | None = None
        self.squares: list[list[float]] = []  # by layer: error, size
        if state is not None:
            self.squares = [[0.0, 0.0] for _ in state.thresholds]
            if state.scheme.audits:
                first = 1 - min(WIDEST, max(NARROWEST, state.scheme.level**2))
                state.thresholds = [first] * len(state.thresholds)

    def before(self, step: int) -> None:
        """`step` counts from 0."""
        if self.state is None:
            return
        o = self.options
        self.state.on = o.condense_warmup <= step < math.ceil(o.condense_until * o.steps)
        self.state.step = step
        if self.state.scheme.policy == "paper" and self.initial_loss is not None and self.loss is not None:
            h = paper_threshold(self.initial_loss, self.loss)
            self.state.thresholds = [h] * len(self.state.thresholds)

    def after(self, loss: float, counts: torch.Tensor | None) -> dict[str, Any]:
        """counts [layers, 5] of the whole step (luffy.exchange.audit); what to write down of it."""
        if self.state is None or counts is None:
            return {}
        self.initial_loss, self.loss = self.initial_loss or loss, loss
        if not self.state.on:
            return {"condense": {"kept": 1.0}}
        rows = counts.double().tolist()
        record: dict[str, Any] = {"kept": sum(r[1] for r in rows) / max(1.0, sum(r[0] for r in rows))}
        layers = []
        for i, (copies, sent, audited, error, size) in enumerate(rows):
            layer = {"kept": sent / max(1.0, copies), "threshold": self.state.thresholds[i]}
            if audited:
                layer["error"] = math.sqrt(error / max(size, 1e-300))
            layers.append({key: round(value, 6) for key, value in layer.items()})
            if self.state.scheme.audits:
                self.state.thresholds[i] = self._moved(i, audited, error, size)
        audits = [sum(column) for column in zip(*rows, strict=True)]
        if audits[2]:
            record["error"] = math.sqrt(audits[3] / max(audits[4], 1e-300))
        return {"condense": record | {f"layer_{i:02d}": layer for i, layer in enumerate(layers)}}

    def _moved(self, layer: int, audited: float, error: float, size: float) -> float:
        assert self.state is not None
        gap, budget = 1 - self.state.thresholds[layer], self.state.scheme.level
        if not budget:
            return 2.0
        if not audited:  # nothing was close enough to be condensed, or too little to be looked at
            factor = FASTEST
        else:
            old = self.squares[layer]
            self.squares[layer] = [MEMORY * old[0] + error, MEMORY * old[1] + size]
            square = self.squares[layer][0] / max(self.squares[layer][1], 1e-300)
            factor = min(FASTEST, max(1 / FASTEST, budget**2 / max(square, 1e-300)))
        return 1 - min(WIDEST, max(NARROWEST, gap * factor))

    def to_dict(self) -> dict[str, Any] | None:
        if self.state is None:
            return None
        return {
            "thresholds": self.state.thresholds,
            "initial_loss": self.initial_loss,
            "loss": self.loss,
            "squares": self.squares,
        }

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; one of a run without condensation begins it anew."""
        if self.state is None or saved is None:
            return
        self.initial_loss, self.loss = saved["initial_loss"], saved["loss"]
        if self.state.scheme.audits:
            self.state.thresholds, self.squares = list(saved["thresholds"]), [list(s) for s in saved["squares"]]
