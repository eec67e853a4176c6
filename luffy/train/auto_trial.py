"""Trying another mode without losing more than it can win: a duel, and the time that a run may spend on duels.

Machines are noisy, and a run grows faster in its first steps. So a challenger is not compared with what the mode at
hand took a while ago but with what it takes now, by turns: challenger, holder, holder, challenger, which takes a steady
trend out of the comparison. The first step after each change is not measured (buffers grow, kernels compile), nor is
one that recorded routing or moved experts; medians decide.

A challenger that is much slower costs time for nothing. It is given up as soon as that shows: when its measured steps
are hopeless, or when all trying has cost its share of the run's time.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from statistics import median

from luffy.plan.choose import Mode

TURN = 4  # steps of each of the four turns
DUEL = 4 * TURN
HOPELESS = 1.25  # times the holder's median: given up before the turns are over
SHARE = 0.015  # of a run's time, for looks and duels together


@dataclass
class Budget:
    """What trying may cost: a share of the time of the run so far and of what the remaining steps should take."""

    steps: int  # of the whole run
    elapsed: float = 0.0
    spent: float = 0.0  # beyond what the mode at hand would have taken

    def left(self, step: int, usual: float) -> float:
        """Seconds; `step` steps are done, and one takes `usual`."""
        return SHARE * (self.elapsed + max(0, self.steps - step) * usual) - self.spent

    def bears_a_duel(self, step: int, usual: float) -> bool:
        """Whether a challenger may turn out hopeless: the step that is not measured and the first that is."""
        return self.left(step, usual) >= 2 * (HOPELESS - 1) * usual and self.steps - step >= 2 * DUEL


@dataclass
class Duel:
    """usual: what a step of the holder took before. seconds: measured, by mode. excess: over `usual`, of the
    challenger's steps, measured or not."""

    challenger: Mode
    holder: Mode
    usual: float
    turns: list[Mode] = field(init=False)
    seconds: dict[Mode, list[float]] = field(init=False)
    excess: float = 0.0

    def __post_init__(self) -> None:
        order = (self.challenger, self.holder, self.holder, self.challenger)
        self.turns = [mode for mode in order for _ in range(TURN)]
        self.seconds = {self.challenger: [], self.holder: []}

    def note(self, mode: Mode, seconds: float, measured: bool) -> None:
        if mode == self.challenger:
            self.excess += seconds - self.usual
        if measured:
            self.seconds[mode].append(seconds)

    def medians(self) -> tuple[float | None, float]:
        """(of the challenger, None where no step was measured; of the holder, as before the duel if so)."""
        theirs, ours = self.seconds[self.challenger], self.seconds[self.holder]
        return median(theirs) if theirs else None, median(ours) if ours else self.usual

    def is_over(self, left: float) -> bool:
        """Whether all turns were taken, or going on makes no sense. left: of the budget, this duel not counted."""
        theirs, ours = self.medians()
        if theirs is None:
            return not self.turns
        return not self.turns or theirs > HOPELESS * ours or self.excess > left

    def won(self) -> bool:
        theirs, ours = self.medians()
        return not self.turns and theirs is not None and theirs < ours
