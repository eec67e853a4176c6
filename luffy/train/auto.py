"""`--recipe auto`: the cost model runs the layers the way it expects to be fastest, and learns where it was wrong.

A run begins as vanilla_dedup. After a few steps, and then at growing intervals, one step's routing is recorded and all
modes are weighed on it (luffy.plan.choose). Nothing is tried that does not promise more than MARGIN. What does meets
the present mode in a duel (luffy.train.auto_trial) and is kept if it won; what the duel showed beyond the model is from
then on the mode's offset. So a mode that was predicted wrongly is tried once, and where links are so fast that nothing
promises anything `auto` costs a recorded step now and then.

    looks      after FIRST steps, then INTERVAL, twice that, ... up to --auto-every while nothing is taken up; more
               rarely where looking itself (recording, weighing) would take half of what may be spent on trying
    counted    steps that record routing or re-home experts are slower and count in no mode's time
    lossy      a wire format (--wire) and condensation (--condense) are permissions: modes like others, where sequences
               stay. Nobody knows what is alike before it was looked for, so condensation is first weighed as if it sent
               nothing; its duel measures the share it keeps and the time it takes. What rounding takes is an offset

Ranks measure different times, so rank 0 decides: whom to challenge, when a duel is over, when to look again.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import replace
from statistics import median
from typing import Any

import torch

from luffy.comm import Comm
from luffy.model import Transformer
from luffy.plan.choose import RESIDENCIES, LayerRates, Mode, weigh
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep
from luffy.train.auto_trial import SHARE, Budget, Duel
from luffy.train.rehoming import current_owners, wire_of
from luffy.wire_format import RowBytes

COLD = 3  # first steps of a process, which are like no others
FIRST = 8  # steps before the first look
INTERVAL = 10  # steps to the second
MARGIN = 0.02
KEPT = 50  # steps whose times are remembered
WEIGHED = 4  # recorded micro-batches of a step that are weighed

_GO_ON, _HOLDER, _CHALLENGER = range(3)


class AutoControl:
    """One rank's part. topology: links as measured; pair_seconds: of one (row, expert) pair; steps: of the run."""

    def __init__(
        self, model: Transformer, comm: Comm, topology: Topology, pair_seconds: float, *, steps: int, every: int,
        padded: bool, clock: Callable[[], float] = time.perf_counter,
    ) -> None:  # fmt: skip
        self.model, self.comm, self.topology = model, comm, topology
        self.pair_seconds, self.every, self.padded, self.clock = pair_seconds, every, padded, clock
        self.num_layers, self.condense = len(model.moe_layers), model.runtime.condense
        self.formats = _row_sizes(model) if model.runtime.recipe.wire != "model" else {}
        self.mode = Mode(False, ("static",) * self.num_layers)
        self.budget = Budget(steps)
        self.offsets: dict[Mode, float] = {self.mode: 0.0}
        self.kept: float | None = None  # share of copies, as condensation was last seen to leave it
        self.condense_seconds = 0.0
        # Steps to the next look but one, at most `longest`; steps done at the next.
        self.interval, self.longest, self.next_look = INTERVAL, every, FIRST
        self.duel: Duel | None = None
        self.table: dict[Mode, float] = {}  # of the last look
        self.may_condense = False  # at this step: neither warm-up nor after the condensed part of the run
        self._last, self._fresh = self.mode, False  # the mode of the step before; whether this one is another
        self._warm: int | None = None  # the first step of this process that counts
        self._seconds: deque[float] = deque(maxlen=KEPT)
        self._attention: deque[float] = deque(maxlen=KEPT)
        self._kept: deque[tuple[float, float]] = deque(maxlen=KEPT)

    # ---------------------------------------------------------------- around a step

    def before(self, step: int) -> None:
        """`step` counts from 0. Call when it is known whether this step may condense (CondenseControl.before)."""
        if self._warm is None:
            self._warm = step + COLD
            self.next_look = max(self.next_look, step + FIRST)
        self.may_condense = self.condense is not None and self.condense.on
        if not self.may_condense:
            if self.duel and (self.duel.challenger.condenses or self.duel.holder.condenses):
                self._end_duel(step, self.duel.holder)
            if self.mode.condenses:
                self._hold(replace(self.mode, condenses=False))
        if self.duel:
            self.set(self.duel.turns.pop(0))
        self._last, self._fresh = self.mode, self.mode != self._last
        if self.condense is not None:
            self.condense.on = self.condense.on and self.mode.condenses

    def decides_after(self, step: int) -> bool:
        """Whether step `step`, counted from 0, is recorded and followed by a look."""
        return step + 1 >= self.next_look and self.duel is None and bool(self._seconds)

    def after(self, step: int, record: dict[str, Any], traced: list[TraceStep], plain: bool) -> dict[str, Any] | None:
        """Note a step, and decide if it is time. plain: it neither recorded nor re-homed. What to write down of it."""
        assert self._warm is not None
        seconds, split = record["seconds"], record["seconds_split"]
        self.budget.elapsed += seconds
        measured = plain and not self._fresh and step >= self._warm
        if measured:
            self._attention.append(split["attention"])
            if self.mode.condenses:
                self._kept.append((record["condense"]["kept"], split["condense"]))
        if self.duel is not None:
            return self._fight(step, seconds, measured)
        if self.decides_after(step):
            return self._look(step, seconds, traced)
        if measured:
            self._seconds.append(seconds)
        return None

    # ---------------------------------------------------------------- looks

    def _look(self, step: int, seconds: float, traced: list[TraceStep]) -> dict[str, Any]:
        begin, usual = self.clock(), median(self._seconds)
        self._learn_condensing()
        self.table = self._weigh(traced)
        here = usual - self.table[self.mode] - self._offset(self.mode)
        predicted = {m: here + s + self._offset(m) for m, s in self.table.items()}
        modes = sorted(predicted, key=lambda m: (m.moves, m.condenses, m.wire, m.residency))
        best = min(modes, key=lambda m: predicted[m])
        cost = max(0.0, seconds - usual) + self.clock() - begin
        self.budget.elapsed += self.clock() - begin
        self.budget.spent += cost
        if predicted[best] > usual * (1 - MARGIN) or not self.budget.bears_a_duel(step + 1, usual):
            best = self.mode
        left = self.budget.left(step + 1, usual)
        most = math.ceil(2 * cost / (SHARE * usual)) if left > cost else self.budget.steps
        *encoded, most = self._agree([*self._encode(best), most])
        self.longest = max(self.every, most)
        chosen = self._decode(encoded)
        out = {
            "mode": self.mode.name,
            "got_seconds": usual,
            "chosen": chosen.name,
            "residency": list(chosen.residency),
            "predicted_seconds": {m.name: predicted[m] for m in modes},
            "kept_share": self.kept,  # None: not known, and taken as 0
            "spent_seconds": self.budget.spent,
        }
        if chosen != self.mode:
            self.duel = Duel(chosen, self.mode, usual)
        else:
            self._wait(step, taken_up=False)
        return out

    def _weigh(self, traced: list[TraceStep]) -> dict[Mode, float]:
        """Modelled seconds of a step by mode."""
        share = len(traced) / len(traced[:WEIGHED])
        attention = median(self._attention) / self.model.config.num_layers / len(traced)
        table = weigh(
            traced[:WEIGHED],
            current_owners(self.model),
            replace(wire_of(self.model, self.padded), topology=self.topology),
            LayerRates(self.pair_seconds, attention),
            moving=self.model.runtime.recipe.placement,
            formats=self.formats,
            also=replace(self.mode, condenses=False),
        )
        table = {m: s * share for m, s in table.items()}
        if self.may_condense:
            able = [m for m in table if not m.moves and set(m.residency) == {"static"}]
            table |= {replace(m, condenses=True): self._condensed(table[m]) for m in able}
        return table

    def _condensed(self, seconds: float) -> float:
        """Of a mode that takes `seconds` without: rows and pairs in proportion to what is kept."""
        return seconds * (self.kept or 0.0) + self.condense_seconds

    def _learn_condensing(self) -> None:
        if self._kept:
            self.kept, self.condense_seconds = (median(column) for column in zip(*self._kept, strict=True))

    def _offset(self, mode: Mode) -> float:
        """What a duel showed; else of the mode most like it, or put together from those of its parts."""
        if mode in self.offsets:
            return self.offsets[mode]

        def differing(other: Mode) -> int:
            return sum(a != b for a, b in zip(mode.residency, other.residency, strict=True))

        alike = [m for m in self.offsets if replace(m, residency=mode.residency) == mode]
        nearest = min(alike, key=differing, default=None)
        if nearest is not None and 2 * differing(nearest) < self.num_layers:
            return self.offsets[nearest]
        L, plain = self.num_layers, Mode(False, ("static",) * self.num_layers)
        parts = [self.offsets.get(replace(plain, residency=(kind,) * L), 0.0) for kind in mode.residency]
        ways = [replace(plain, moves=True)] * mode.moves + [replace(plain, condenses=True)] * mode.condenses
        ways += [replace(plain, wire=mode.wire)] * (mode.wire != "model")
        return sum(parts) / L + sum(self.offsets.get(way, 0.0) for way in ways)

    def _wait(self, step: int, taken_up: bool) -> None:
        """Look again in a while, counted from the end of step `step`."""
        if taken_up:
            self.interval = INTERVAL
        if self.longest >= self.budget.steps:  # nothing is left for looking
            self.interval = self.longest
        self.interval = min(self.interval, self.longest)
        self.next_look = step + 1 + self.interval
        self.interval *= 2

    # ---------------------------------------------------------------- duels

    def _fight(self, step: int, seconds: float, measured: bool) -> dict[str, Any] | None:
        """Note a step of a duel; at its end keep the faster. What to write down of it, else None."""
        duel = self.duel
        assert duel is not None
        duel.note(self.mode, seconds, measured)
        verdict = _GO_ON
        if duel.is_over(self.budget.left(step + 1, duel.usual)):
            verdict = _CHALLENGER if duel.won() else _HOLDER
        (verdict,) = self._agree([verdict])
        if verdict == _GO_ON:
            return None
        theirs, ours = duel.medians()
        if theirs is not None:
            self._learn_condensing()
            if duel.challenger.condenses:  # the table knew neither what is kept nor what finding it takes
                self.table[duel.challenger] = self._condensed(self.table[replace(duel.challenger, condenses=False)])
            if duel.challenger in self.table:  # another EP group's mixture may not be: then rank 0 knows its offset
                modelled = self.table[duel.challenger] - self.table[duel.holder]
                self.offsets[duel.challenger] = self._offset(duel.holder) + theirs - ours - modelled
        out = {
            "mode": duel.holder.name,
            "got_seconds": ours,
            "challenger": duel.challenger.name,
            "challenger_seconds": theirs,
            "given_up": bool(duel.turns),
            "spent_seconds": self.budget.spent + max(0.0, duel.excess),
        }
        self._end_duel(step, duel.challenger if verdict == _CHALLENGER else duel.holder)
        return out | {"chosen": self.mode.name, "residency": list(self.mode.residency)}

    def _end_duel(self, step: int, kept: Mode) -> None:
        """Go on in `kept` after step `step`."""
        assert self.duel is not None
        taken_up = kept == self.duel.challenger
        self.budget.spent += max(0.0, self.duel.excess)
        self.duel = None
        self._hold(kept)
        self._wait(step, taken_up)

    def _hold(self, mode: Mode) -> None:
        """Be in this mode for good; what was measured of another says nothing of it."""
        if mode not in self.offsets:
            self.offsets[mode] = self._offset(mode)
        self.set(mode)
        self._seconds.clear()

    def set(self, mode: Mode) -> None:
        """Run the layers this way from here on."""
        self.mode = mode
        recipe = self.model.runtime.recipe
        for moe, residency in zip(self.model.moe_layers, mode.residency, strict=True):
            moe.recipe = replace(
                recipe,
                placement=recipe.placement if mode.moves else "stay",
                look_ahead=mode.moves,
                residency=residency,
                wire=mode.wire,
            )

    # ---------------------------------------------------------------- agreeing, checkpoints

    def _agree(self, numbers: list[int]) -> list[int]:
        """Rank 0's."""
        mine = torch.tensor(numbers, device=self.comm.mesh.device)
        return [int(n) for n in self.comm.all_gather_world(mine)[0]]

    def _encode(self, mode: Mode) -> list[int]:
        wires = ["model", *self.formats]
        kinds = [RESIDENCIES.index(kind) for kind in mode.residency]
        return [int(mode.moves), int(mode.condenses), wires.index(mode.wire), *kinds]

    def _decode(self, numbers: list[int]) -> Mode:
        moves, condenses, wire, *kinds = numbers
        residency = tuple(RESIDENCIES[kind] for kind in kinds)
        return Mode(bool(moves), residency, ["model", *self.formats][wire], bool(condenses))

    def to_dict(self) -> dict[str, Any]:
        """For a checkpoint. A duel at hand is not kept: who held goes on."""
        mode = self.duel.holder if self.duel else self.mode
        return {
            "mode": mode.to_dict(),
            "offsets": [[m.to_dict(), seconds] for m, seconds in self.offsets.items()],
            "kept": self.kept,
            "condense_seconds": self.condense_seconds,
            "elapsed": self.budget.elapsed,
            "spent": self.budget.spent,
            "interval": self.interval,
            "longest": self.longest,
            "next_look": self.next_look,
        }

    def restore(self, data: dict[str, Any]) -> None:
        """What was learnt, even where a mode of the run before is not allowed any more."""
        self.offsets = {Mode.from_dict(m): seconds for m, seconds in data["offsets"]}
        self.kept, self.condense_seconds = data["kept"], data["condense_seconds"]
        self.budget.elapsed, self.budget.spent = data["elapsed"], data["spent"]
        self.interval, self.longest, self.next_look = data["interval"], data["longest"], data["next_look"]
        mode = Mode.from_dict(data["mode"])
        if mode.wire != "model" and mode.wire not in self.formats:
            mode = replace(mode, wire="model")
        if mode.condenses and self.condense is None:
            mode = replace(mode, condenses=False)
        self._hold(mode)


def _row_sizes(model: Transformer) -> dict[str, RowBytes]:
    """The wire format that the user allows, with the bytes of its rows."""
    recipe = model.runtime.recipe
    sizes = recipe.wire_spec.row_bytes(model.config.hidden_size, model.stream_dtype.itemsize)
    return {recipe.wire: sizes}
