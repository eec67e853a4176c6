"""`--recipe auto`: the cost model runs the layers the way it expects to be fastest, and learns where it was wrong.

    steps 2..13          try vanilla_dedup, fetching, shadows and migration, a few steps each (and --wire, if given)
    then, every n steps  weigh all modes on the routing just recorded, choose, run, compare

All modes are lossless, but for the wire format that `--wire` allows, so trying one costs time at most. What a trial
took beyond what the model gives is the mode's offset; a mixture's is put together from those of its parts. A mode that
ran between two looks gets an offset of its own from that. None is taken up for less than MARGIN.
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
from luffy.wire_format import RowBytes

COLD = 2  # first steps of a run, which are like no others
TRIAL = 3  # steps that each kind of mode is tried
SETTLING = 1  # steps after a change that are not measured
MARGIN = 0.02


class AutoControl:
    """One rank's part; all ranks take rank 0's choice. topology: links as measured; pair_seconds: of one pair."""

    def __init__(self, model: Transformer, comm: Comm, topology: Topology, pair_seconds: float, *, every: int,
                 padded: bool) -> None:  # fmt: skip
        self.model, self.comm, self.topology = model, comm, topology
        self.pair_seconds, self.every, self.padded = pair_seconds, every, padded
        self.mode = Mode(False, ("static",) * len(model.moe_layers))
        L = len(model.moe_layers)
        self.trials = [Mode(False, (kind,) * L) for kind in ("static", "fetch", "shadow")] + [
            Mode(True, ("static",) * L)
        ]
        self.formats = _row_sizes(model) if model.runtime.recipe.wire != "model" else {}
        self.trials += [Mode(False, ("static",) * L, name) for name in self.formats]
        self.first = COLD + TRIAL * len(self.trials)
        self.offsets: dict[Mode, float] = {}
        self.tried: dict[Mode, list[float]] = {m: [] for m in self.trials}
        self.began = 0
        self._seconds: list[float] = []
        self._attention: list[float] = []

    def before(self, step: int) -> None:
        """`step` counts from 0: in the trials, run it the way that is due."""
        if COLD <= step < self.first:
            self.set(self.trials[(step - COLD) // TRIAL])

    def decides_after(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is recorded and followed by a choice."""
        return step + 1 == self.first or (step >= self.first and (step + 1) % self.every == 0)

    def after(self, step: int, record: dict[str, Any], traced: list[TraceStep]) -> dict[str, Any] | None:
        """Note a step's time; where it was recorded, choose anew. What to write down of it, else None."""
        self._attention.append(record["seconds_split"]["attention"])
        if COLD <= step < self.first and (step - COLD) % TRIAL >= SETTLING:
            self.tried[self.mode].append(record["seconds"])
        if not self.decides_after(step):  # recorded steps gather choices and are slower
            if step >= self.began + SETTLING:
                self._seconds.append(record["seconds"])
            return None
        trying = step + 1 == self.first
        if not (self._seconds or trying):
            return None
        attention = median(self._attention[-50:]) / self.model.config.num_layers / max(1, len(traced))
        wire = replace(wire_of(self.model, self.padded), topology=self.topology, row_bytes=None)
        table = weigh(
            traced, current_owners(self.model), wire, LayerRates(self.pair_seconds, attention), formats=self.formats
        )
        if trying:
            self.set(self.trials[0])
            self.offsets = {m: median(seconds) - table[m] for m, seconds in self.tried.items()}
        got = median(self._seconds) if not trying else median(self.tried[self.mode])
        if self.mode not in table:  # the mixture of the last look is no longer the best: weigh it by its nearest
            table[self.mode] = min(
                s for m, s in table.items() if (m.moves, m.wire) == (self.mode.moves, self.mode.wire)
            )
        self.offsets[self.mode] = got - table[self.mode]
        predicted = {m: s + self._offset(m) for m, s in table.items()}
        modes = sorted(predicted, key=lambda m: (m.moves, m.wire, m.residency))
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

    def _offset(self, mode: Mode) -> float:
        """Learnt, or put together from the trials: each layer's share of its residency's, and that of moving."""
        if mode in self.offsets:
            return self.offsets[mode]
        base = self.offsets[self.trials[0]]
        extra = {(m.moves, m.residency[0], m.wire): self.offsets[m] - base for m in self.trials}
        of_kind = {kind: extra[False, kind, "model"] for kind in set(mode.residency)}
        way = extra[mode.moves, "static", mode.wire]
        return base + way + sum(of_kind[kind] for kind in mode.residency) / len(mode.residency)

    def _agree(self, index: int) -> int:
        mine = torch.tensor([index], device=self.comm.mesh.device)
        return int(self.comm.all_gather_world(mine)[0])

    def set(self, mode: Mode) -> None:
        """Run the layers this way from here on."""
        self.mode = mode
        recipe = self.model.runtime.recipe
        for moe, residency in zip(self.model.moe_layers, mode.residency, strict=True):
            placement = recipe.placement if mode.moves else "stay"
            moe.recipe = replace(
                recipe, placement=placement, look_ahead=mode.moves, residency=residency, wire=mode.wire
            )

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        return {
            "moves": self.mode.moves,
            "residency": list(self.mode.residency),
            "wire": self.mode.wire,
            "began": self.began,
            "offsets": [[m.moves, list(m.residency), m.wire, s] for m, s in self.offsets.items()],
        }

    def restore(self, data: dict[str, Any]) -> None:
        self.began = data["began"]
        self.offsets = {Mode(moves, tuple(kinds), wire): s for moves, kinds, wire, s in data["offsets"]}
        self.set(Mode(data["moves"], tuple(data["residency"]), data["wire"]))


def _row_sizes(model: Transformer) -> dict[str, RowBytes]:
    """The wire format that the user allows, with the bytes of its rows."""
    recipe = model.runtime.recipe
    sizes = recipe.wire_spec.row_bytes(model.config.hidden_size, model.stream_dtype.itemsize)
    return {recipe.wire: sizes}
