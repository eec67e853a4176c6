"""`--recipe auto`: the cost model runs the layers the way it expects to be fastest, and learns where it was wrong.

    steps 0..7           as vanilla_dedup; the last of them is recorded
    then, every n steps  weigh the modes on the recorded routing, choose, run, compare

All modes are lossless. A mode that was run keeps the difference between its measured and its modelled time as its
offset; others borrow that of the present one. So a mode that disappoints (a planner too slow for this link) is left at
the next look, and none is taken up for less than MARGIN.
"""

from __future__ import annotations

from dataclasses import replace
from statistics import median
from typing import Any

import torch

from luffy.comm import Comm
from luffy.model import Transformer
from luffy.plan.choose import LayerRates, Mode, weigh
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep
from luffy.train.rehoming import current_owners, wire_of

FIRST = 8  # steps before the first choice
SETTLING = 2  # steps after a change that are not measured
MARGIN = 0.02


class AutoControl:
    """One rank's part; all ranks take rank 0's choice. topology: links as measured; pair_seconds: of one pair."""

    def __init__(self, model: Transformer, comm: Comm, topology: Topology, pair_seconds: float, *, every: int,
                 padded: bool) -> None:  # fmt: skip
        self.model, self.comm, self.topology = model, comm, topology
        self.pair_seconds, self.every, self.padded = pair_seconds, every, padded
        self.mode = Mode(False, ("static",) * len(model.moe_layers))
        self.offsets: dict[Mode, float] = {}
        self.began = 0
        self._seconds: list[float] = []
        self._attention: list[float] = []

    def decides_after(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is recorded and followed by a choice."""
        return step + 1 == FIRST or (step + 1) % self.every == 0

    def after(self, step: int, record: dict[str, Any], traced: list[TraceStep]) -> dict[str, Any] | None:
        """Note a step's time; where it was recorded, choose anew. What to write down of it, else None."""
        self._attention.append(record["seconds_split"]["attention"])
        if not self.decides_after(step):  # recorded steps gather choices and are slower
            if step >= self.began + SETTLING:
                self._seconds.append(record["seconds"])
            return None
        if not self._seconds:
            return None
        got = median(self._seconds)
        attention = median(self._attention[-50:]) / self.model.config.num_layers / max(1, len(traced))
        wire = replace(wire_of(self.model, self.padded), topology=self.topology)
        table = weigh(traced, current_owners(self.model), wire, LayerRates(self.pair_seconds, attention))
        if self.mode not in table:  # the mixture of the last look is no longer the best: weigh it by its nearest
            table[self.mode] = min(s for m, s in table.items() if m.moves == self.mode.moves)
        self.offsets[self.mode] = got - table[self.mode]
        predicted = {m: s + self.offsets.get(m, self.offsets[self.mode]) for m, s in table.items()}
        modes = sorted(predicted, key=lambda m: (m.moves, m.residency))
        best = min(modes, key=lambda m: predicted[m])
        if predicted[best] > got * (1 - MARGIN):
            best = self.mode
        chosen = modes[self._agree(modes.index(best))]
        out = {
            "mode": self.mode.name,
            "got_seconds": got,
            "chosen": chosen.name,
            "residency": list(chosen.residency),
            "predicted_seconds": {m.name: predicted[m] for m in modes},
        }
        self.set(chosen)
        self.began, self._seconds = step + 1, []
        return out

    def _agree(self, index: int) -> int:
        mine = torch.tensor([index], device=self.comm.mesh.device)
        return int(self.comm.all_gather_world(mine)[0])

    def set(self, mode: Mode) -> None:
        """Run the layers this way from here on."""
        self.mode = mode
        recipe = self.model.runtime.recipe
        for moe, residency in zip(self.model.moe_layers, mode.residency, strict=True):
            placement = recipe.placement if mode.moves else "stay"
            moe.recipe = replace(recipe, placement=placement, look_ahead=mode.moves, residency=residency)

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {"moves": self.mode.moves, "residency": list(self.mode.residency), "began": self.began}

    def restore(self, data: dict[str, Any]) -> None:
        self.began = data["began"]
        self.set(Mode(data["moves"], tuple(data["residency"])))
