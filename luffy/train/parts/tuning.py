"""`--recipe auto`: tries the few whole modes that the user allows, by turns, and keeps the fastest.

A mode is: sequences seated or as read, with or without overlap, and a format of rows; lossless unless --wire allows
low bits. At the start, and again when the speed has changed or much time has passed, the mode at hand meets each mode
that differs from it in one way. Turns of a few steps alternate, so that a trend of the machine falls on both; the first
step of a turn does not count. A challenger that is much slower is given up after one turn. Rank 0 decides for all.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from luffy.comm import Comm
from luffy.train.parts import Done, Stateless

FIRST = 24  # steps before the first look: seats have been learnt by then
TURN = 4  # steps of a turn, of which the first does not count
HOPELESS = 1.12  # times the holder's median: given up after one turn
MARGIN = 0.99  # a challenger must be faster than this share of the holder's median
CHANGED = 1.25  # the factor, up or down, by which the speed has changed enough to look again
RECENT = 20  # steps whose median is watched for that


@dataclass(frozen=True)
class Mode:
    """One whole way to run. wire: of --wire."""

    seated: bool = True
    overlap: bool = False
    wire: str = "model"

    @property
    def name(self) -> str:
        parts = ["seated" if self.seated else "as read"]
        parts += ["overlapped"] if self.overlap else []
        return ", ".join(parts + ([f"rows in {self.wire}"] if self.wire != "model" else []))

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


def challengers(holder: Mode, may_overlap: bool, wires: Sequence[str]) -> Iterator[Mode]:
    """Modes that differ from `holder` in one way."""
    yield from (replace(holder, wire=wire) for wire in wires if wire != holder.wire)
    yield replace(holder, seated=not holder.seated)
    if may_overlap:
        yield replace(holder, overlap=not holder.overlap)


def _difference(mode: Mode, other: Mode) -> tuple[bool, bool, str]:
    return mode.seated != other.seated, mode.overlap != other.overlap, mode.wire if mode.wire != other.wire else ""


class Tuning(Stateless):
    """use(mode): run the next steps so. wires: formats that the user allows, "model" among them. every: most steps
    between looks."""

    name = "auto"

    def __init__(
        self, use: Callable[[Mode], None], comm: Comm, *, may_overlap: bool, wires: Sequence[str], every: int
    ) -> None:
        self.use, self.comm, self.may_overlap, self.wires, self.every = use, comm, may_overlap, tuple(wires), every
        self.holder, self.mode = Mode(), Mode()
        self.waiting: list[Mode] = []  # challengers of this look
        self.turns: list[Mode] = []  # of the duel at hand, the present one first
        self.place = 0  # steps of the present turn that are done
        self.seconds: dict[Mode, list[float]] = {}  # a token, by mode, of the duel at hand
        self.tried: dict[str, float] = {}  # median of this look, by name, over the holder's at the time
        self.next_look, self.usual = FIRST, 0.0
        self.recent: deque[float] = deque(maxlen=RECENT)

    def before(self, step: int) -> None:
        """`step` counts from 0."""
        if not self.turns and not self.waiting and step >= self.next_look:
            self.tried = {}
            self.waiting = list(challengers(self.holder, self.may_overlap, self.wires))
        if not self.turns and self.waiting:
            rival = self.waiting.pop(0)
            self.turns, self.place, self.seconds = [rival, self.holder, rival, self.holder], 0, {}
        self._run_as(self.turns[0] if self.turns else self.holder)

    def _run_as(self, mode: Mode) -> None:
        if mode != self.mode:
            self.mode = mode
            self.use(mode)

    def after(self, step: int, done: Done) -> None:
        done.record["mode"] = self.mode.name
        each = done.record["seconds"] / max(1, done.record["tokens"])
        if not self.turns:
            self._watch(step, each, done.plain)
            return
        self.place += 1
        if self.place > 1 and done.plain:
            self.seconds.setdefault(self.mode, []).append(each)
        if self.place == TURN:
            self.place = 0
            self.turns.pop(0)
            if len(self.turns) in (0, 2):
                self._judge(step, done)

    def _watch(self, step: int, each: float, plain: bool) -> None:
        """Look again if steps take another time than when the mode was chosen."""
        if plain:
            self.recent.append(each)
        if len(self.recent) < RECENT or step + 1 >= self.next_look:
            return
        now = median(self.recent)
        self.usual = self.usual or now
        changed = not 1 / CHANGED < now / self.usual < CHANGED
        if self._agree(changed):
            self.next_look = step + 1

    def _judge(self, step: int, done: Done) -> None:
        """After both have had a turn, or all turns are over."""
        rival = next(m for m in self.seconds if m != self.holder) if len(self.seconds) > 1 else self.holder
        ratio = median(self.seconds[rival]) / median(self.seconds[self.holder]) if rival != self.holder else 1.0
        over = not self.turns or ratio > HOPELESS
        won = not self.turns and ratio < MARGIN
        verdict = self._agree(2 * over + won)
        if verdict < 2:
            return
        self.turns = []
        self.tried[rival.name] = ratio
        if verdict == 3:
            # Ways that were tried against the old holder are not tried again against the new one in this look.
            left = {_difference(m, self.holder) for m in self.waiting}
            rivals = challengers(rival, self.may_overlap, self.wires)
            self.holder, self.waiting = rival, [m for m in rivals if _difference(m, rival) in left]
        if not self.waiting:
            self.next_look, self.usual = step + 1 + self.every, 0.0
            self.recent.clear()
            done.record["auto"] = {"chosen": self.holder.name, "tried": dict(self.tried), "note": self._note()}

    def _note(self) -> str:
        tried = ", ".join(f"{name} took {ratio:.2f} of the mode it met" for name, ratio in self.tried.items())
        return f"auto runs {self.holder.name}: {tried}"

    def _agree(self, number: int) -> int:
        """Rank 0's."""
        mine = torch.tensor([int(number)], device=self.comm.mesh.device)
        return int(self.comm.all_gather_world(mine)[0])

    def state(self) -> dict[str, Any]:
        """A duel at hand is not kept: who held goes on."""
        return {"mode": self.holder.to_dict(), "next_look": self.next_look}

    def load(self, state: dict[str, Any]) -> None:
        if state:
            held = Mode(**state["mode"])  # perhaps of other options, or of ranks among which the halves divided
            wire = held.wire if held.wire in self.wires else "model"
            self.holder = replace(held, wire=wire, overlap=held.overlap and self.may_overlap)
            self.next_look = state["next_look"]
            self._run_as(self.holder)
