"""Condensation over a run: when it is on, and at which threshold.

The paper's threshold follows the loss. Everything here follows from numbers that all ranks share, and is kept in
checkpoints.
"""

from __future__ import annotations

import math
from typing import Any

import torch

from luffy.exchange.condense import CondenseState
from luffy.plan.condensation import paper_threshold
from luffy.train.options import TrainOptions


class CondenseControl:
    """Sets a CondenseState before each step, and learns from it after. `state` None: nothing to do."""

    def __init__(self, state: CondenseState | None, options: TrainOptions) -> None:
        self.state, self.options = state, options
        self.initial_loss: float | None = None
        self.loss: float | None = None

    def before(self, step: int) -> None:
        """`step` counts from 0."""
        if self.state is None:
            return
        o = self.options
        self.state.on = o.condense_warmup <= step < math.ceil(o.condense_until * o.steps)
        if self.state.scheme.policy == "paper" and self.initial_loss is not None and self.loss is not None:
            h = paper_threshold(self.initial_loss, self.loss)
            self.state.thresholds = [h] * len(self.state.thresholds)

    def after(self, loss: float, counts: torch.Tensor | None) -> dict[str, Any]:
        """counts [layers, 2] of the whole step (luffy.exchange.condense.Condensed); what to write down of it."""
        if self.state is None or counts is None:
            return {}
        self.initial_loss, self.loss = self.initial_loss or loss, loss
        if not self.state.on:
            return {"condense": {"kept": 1.0}}
        rows = counts.double().tolist()
        record: dict[str, Any] = {"kept": sum(sent for _, sent in rows) / max(1.0, sum(copies for copies, _ in rows))}
        for i, (copies, sent) in enumerate(rows):
            kept, threshold = sent / max(1.0, copies), self.state.thresholds[i]
            record[f"layer_{i:02d}"] = {"kept": round(kept, 6), "threshold": round(threshold, 6)}
        return {"condense": record}

    def to_dict(self) -> dict[str, Any] | None:
        if self.state is None:
            return None
        return {"initial_loss": self.initial_loss, "loss": self.loss}

    def restore(self, saved: dict[str, Any] | None) -> None:
        """Continue from a checkpoint; one of a run without condensation begins it anew."""
        if self.state is None or saved is None:
            return
        self.initial_loss, self.loss = saved["initial_loss"], saved["loss"]
