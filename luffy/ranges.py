"""Which numbers an option may be: checked in one way, said in one way."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from luffy.errors import UserError


@dataclass(frozen=True)
class Range:
    """From `least` to `most`, both allowed unless `above` or `below` says otherwise; never NaN, never endless."""

    least: float | None = None
    most: float | None = None
    above: bool = False
    below: bool = False
    whole: bool = False

    def __contains__(self, value: Any) -> bool:
        if isinstance(value, bool) or not isinstance(value, int if self.whole else int | float):
            return False
        if not math.isfinite(value):
            return False
        low = self.least is None or (value > self.least if self.above else value >= self.least)
        return low and (self.most is None or (value < self.most if self.below else value <= self.most))

    def __str__(self) -> str:
        """'a number from 0 to 1', 'a whole number of at least 1'."""
        noun = "a whole number" if self.whole else "a number"
        if self.most is None:
            return f"{noun} {'above' if self.above else 'of at least'} {self.least:g}"
        if not self.above and not self.below:
            return f"{noun} from {self.least:g} to {self.most:g}"
        low, high = "above" if self.above else "of at least", "below" if self.below else "at most"
        return f"{noun} {low} {self.least:g} and {high} {self.most:g}"

    def check(self, option: str, value: Any) -> None:
        """UserError, with the range that is allowed, for a value outside of it. None is not given, and passes."""
        if value is not None and value not in self:
            shown = f"{value:g}" if isinstance(value, float) else repr(value)
            raise UserError(f"{option} {shown}: give {self}")


COUNT = Range(0, whole=True)
AT_LEAST_ONE = Range(1, whole=True)
NOT_NEGATIVE = Range(0)
POSITIVE = Range(0, above=True)
SHARE = Range(0, 1)
SEED = Range(0, 2**63 - 1, whole=True)
