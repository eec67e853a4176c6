"""`--recipe auto`: the cost model runs the layers the way it expects to be fastest, and learns where it was wrong.

    steps 2..17          try vanilla_dedup, fetching, shadows and migration (and --wire, if given), there and back again
    then, every n steps  weigh all modes on the routing just recorded; what promises more than MARGIN meets the present
                         mode in a duel, by turns, and is kept if it won

All modes are lossless, but for the wire format that `--wire` allows, so trying one costs time at most. What a trial
took beyond what the model gives is the mode's offset; a mixture's is put together from those of its parts. A mode that
ran between two looks gets an offset of its own from that.

A run grows faster in its first steps, and machines are noisy. So trials go through the modes forth and back, which
takes a steady trend out of the comparison, and no prediction is trusted without a duel: whatever loses to the mode at
hand, in the same minute, is not taken up. That is also what keeps `auto` out of the way where links are fast.
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
TRIAL = 2  # steps of each mode forth, and as many back
SETTLING = 1  # steps after a change that are not measured
DUEL = 4  # steps of each of the four turns of a duel: challenger, holder, holder, challenger
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
        self.schedule = [m for m in [*self.trials, *reversed(self.trials)] for _ in range(TRIAL)]
        self.first = COLD + len(self.schedule)
        # A duel at hand: what is still to run, and the seconds of the challenger and of the holder.
        self.turns: list[Mode] = []
        self.challenger, self.holder = self.mode, self.mode
        self.duel: dict[Mode, list[float]] = {}
        self.offsets: dict[Mode, float] = {}
        self.tried: dict[Mode, list[float]] = {m: [] for m in self.trials}
        self.began, self.fresh = 0, False
        self._seconds: list[float] = []
        self._attention: list[float] = []

    def before(self, step: int) -> None:
        """`step` counts from 0: in the trials and in a duel, run it the way that is due."""
        due = self.mode
        if COLD <= step < self.first:
            due = self.schedule[step - COLD]
        elif self.turns:
            due = self.turns.pop(0)
        self.fresh = due != self.mode
        if self.fresh:
            self.set(due)

    def decides_after(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is recorded and followed by a choice."""
        return step + 1 == self.first or (step >= self.first and not self.duel and (step + 1) % self.every == 0)

    def after(self, step: int, record: dict[str, Any], traced: list[TraceStep]) -> dict[str, Any] | None:
        """Note a step's time; where it was recorded, choose anew. What to write down of it, else None."""
        self._attention.append(record["seconds_split"]["attention"])
        if COLD <= step < self.first and not self.fresh:
            self.tried[self.mode].append(record["seconds"])
        if self.duel:
            return self._fight(step, record["seconds"])
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
        self.began, self._seconds = step + 1, []
        if chosen != self.mode:
            self.start_duel(chosen)
        return out

    def start_duel(self, challenger: Mode) -> None:
        """Let `challenger` and the present mode run by turns, from the next step on."""
        self.challenger, self.holder = challenger, self.mode
        self.turns = [m for m in (challenger, self.mode, self.mode, challenger) for _ in range(DUEL)]
        self.duel = {challenger: [], self.mode: []}

    def _fight(self, step: int, seconds: float) -> dict[str, Any] | None:
        """Note a step of a duel; at its end keep the faster. What to write down of it, else None."""
        if not self.fresh:
            self.duel[self.mode].append(seconds)
        if self.turns:
            return None
        theirs, ours = (median(self.duel[m]) for m in (self.challenger, self.holder))
        kept = self.challenger if self._agree(int(theirs < ours)) else self.holder
        out = {
            "mode": self.holder.name,
            "got_seconds": ours,
            "challenger": self.challenger.name,
            "challenger_seconds": theirs,
            "chosen": kept.name,
            "residency": list(kept.residency),
        }
        self.set(kept)
        self.began, self._seconds, self.duel = step + 1, [], {}
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
        """For a checkpoint. A duel at hand is not kept: who held goes on."""
        mode = self.holder if self.duel else self.mode
        return {
            "moves": mode.moves,
            "residency": list(mode.residency),
            "wire": mode.wire,
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
