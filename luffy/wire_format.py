"""What `--wire` can say: how rows are written on links, and what that costs in bytes.

    model                       as they are (the default)
    bf16, fp8, fp8_e5m2         narrower floating point; fp8 is e4m3
    int16, int8, int4           integers in blocks of 32 with a scale each
    safe, aggressive            int8 everywhere; int4 to the experts and for the gradient on its way home, else int8
    dispatch=int4,combine=int8  by direction; those not named are as they are

Behind a format of gradients may stand -sr: rounded at random, to the value in the mean (`int4-sr` alone: int4
everywhere, gradients at random). Behind everything, separated by commas:

    local              rows that stay on their rank are rounded as well: as many bytes, but nothing depends on who stays
    residual=int16     how the residual of a sequence that moves travels: model (the default), bf16 or int16
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from luffy.errors import UserError

BLOCK = 32
WIRE_FORMATS = ("model", "bf16", "fp8", "fp8_e5m2", "int16", "int8", "int4")
WIRE_DIRECTIONS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
WIRE_SETS = {
    "safe": "int8",
    "aggressive": "dispatch=int4,combine=int8,dispatch_backward=int4,combine_backward=int8",
}
RESIDUAL_FORMATS = ("model", "bf16", "int16")
SUM_FORMATS = ("model", "bfloat16", "int8")  # of gradients that ranks sum: --gradient-dtype
RANDOM = "-sr"
_CAN_BE_RANDOM = ("int16", "int8", "int4")


def row_num_bytes(name: str, size: int, itemsize: int) -> int:
    """Bytes of a row of `size` values that take `itemsize` bytes each as they are; the last block may be short."""
    name = name.removesuffix(RANDOM)
    if name == "model":
        return itemsize * size
    if name == "bf16":
        return 2 * size
    blocks = -(-size // BLOCK)
    payload = {"int16": 2 * size, "int4": blocks * BLOCK // 2}.get(name, size)
    return payload + 2 * blocks


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row by direction. residual: of a token that moves, each way; 0 where a row carries it free."""

    dispatch: int
    combine: int
    dispatch_backward: int
    combine_backward: int
    residual: int = 0

    @classmethod
    def uniform(cls, num_bytes: int) -> RowBytes:
        return cls(num_bytes, num_bytes, num_bytes, num_bytes)

    @property
    def priced(self) -> tuple[int, int, int]:
        """(combine, next dispatch, residual) as placement weighs them: there and back, in the smallest whole units.

        Uniform rows are priced at their own size, so that a plan of rows as they are says what one direction costs.
        """
        both = (self.combine + self.combine_backward, self.dispatch + self.dispatch_backward, 2 * self.residual)
        half = all(n % 2 == 0 for n in both)
        return (both[0] // 2, both[1] // 2, both[2] // 2) if half else both

    @property
    def mean(self) -> float:
        """Over the four directions."""
        return (self.dispatch + self.combine + self.dispatch_backward + self.combine_backward) / 4


@dataclass(frozen=True)
class WireSpec:
    """`--wire`, read: a format a direction, with "-sr" where rounded at random. local, residual: as above."""

    dispatch: str = "model"
    combine: str = "model"
    dispatch_backward: str = "model"
    combine_backward: str = "model"
    local: bool = False
    residual: str = "model"

    def format(self, direction: str) -> str:
        """The format of one of WIRE_DIRECTIONS."""
        return str(getattr(self, direction))

    @property
    def formats(self) -> dict[str, str]:
        return {direction: self.format(direction) for direction in WIRE_DIRECTIONS}

    def rounds(self, itemsize: int) -> bool:
        """Whether any direction changes a value of so many bytes; bf16 does not change bfloat16."""
        return any(name != "model" and not (name == "bf16" and itemsize <= 2) for name in self.formats.values())

    def row_bytes(self, size: int, itemsize: int) -> RowBytes:
        """Of rows of `size` values."""
        ways = {d: row_num_bytes(name, size, itemsize) for d, name in self.formats.items()}
        residual = row_num_bytes(self.residual, size, itemsize) if self.rounds(itemsize) else 0
        return RowBytes(**ways, residual=residual)


@functools.lru_cache(maxsize=256)
def parse_wire(text: str) -> WireSpec:
    """What `--wire` says; raises UserError naming the option."""
    items = [part.strip() for part in text.split(",")]
    if items[0] in WIRE_SETS:
        items[:1] = WIRE_SETS[items[0]].split(",")
    spec = WireSpec()
    given: set[str] = set()
    for i, item in enumerate(items):
        name, equals, value = (part.strip() for part in item.partition("="))
        if i == 0 and not equals and _is_format(name, gradient=True):
            forward = name.removesuffix(RANDOM)
            spec = WireSpec(forward, forward, name, name)
            given.update(WIRE_DIRECTIONS)
        elif item == "local" and i > 0:
            spec = replace(spec, local=True)
        elif name == "residual" and value in RESIDUAL_FORMATS and i > 0:
            spec = replace(spec, residual=value)
        elif name in WIRE_DIRECTIONS and _is_format(value, gradient=name.endswith("_backward")):
            if name in given:
                raise UserError(f"--wire {text}: {name} is given twice")
            given.add(name)
            spec = replace(spec, **{name: value})  # type: ignore[arg-type]
        else:
            raise UserError(
                f"--wire {text}: cannot read '{item}'; give one of {', '.join((*WIRE_SETS, *WIRE_FORMATS))}, or "
                f"DIRECTION=FORMAT,... with directions {', '.join(WIRE_DIRECTIONS)}; integers of gradients may end in "
                f"{RANDOM}; behind it may stand local, residual={'|'.join(RESIDUAL_FORMATS)}"
            )
    return spec


def _is_format(name: str, *, gradient: bool) -> bool:
    if name.endswith(RANDOM):
        return gradient and name.removesuffix(RANDOM) in _CAN_BE_RANDOM
    return name in WIRE_FORMATS
