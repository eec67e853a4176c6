"""Wire formats: what `--wire` can say, and what a row then weighs.

    model                       as they are (the default)
    bf16                        narrower floating point
    int16, int8, int4           integers in blocks of 32 values with one bfloat16 scale each
    safe, aggressive            int8 everywhere; int4 to the experts and for the gradient on its way home, else int8
    dispatch=int4,combine=int8  by direction; those not named are as they are

`-sr` behind a format of gradients asks for stochastic rounding, right in the mean (`int4-sr` alone: int4 everywhere,
gradients rounded stochastically). `,local` behind everything also rounds rows that stay on their rank: as many bytes,
but then no result depends on who stays.

`FORMATS` is the one table of formats: how many bits a value takes, and how far it may be off. A new format is an entry
here and a codec of the same name in luffy.exchange.wire.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace

from luffy.errors import UserError

BLOCK = 32


@dataclass(frozen=True)
class Format:
    """bits: of a value, None: as many as it has. blocks: values share a bfloat16 scale, 32 by 32.

    error: the largest error of a value, over the largest magnitude of its block (of the value itself without blocks).
    stochastic: whether gradients may be rounded stochastically.
    """

    bits: int | None
    blocks: bool
    error: float
    stochastic: bool = False

    def row_num_bytes(self, size: int, itemsize: int) -> int:
        """Bytes of a row of `size` values that take `itemsize` bytes each as they are; the last block may be short."""
        if self.bits is None:
            return itemsize * size
        if not self.blocks:
            return self.bits * size // 8
        blocks = -(-size // BLOCK)
        return (self.bits * size // 8 if self.bits >= 8 else blocks * BLOCK * self.bits // 8) + 2 * blocks


FORMATS = {
    "model": Format(None, False, 0.0),
    "bf16": Format(16, False, 1 / 256),
    "int16": Format(16, True, 1 / 65000, stochastic=True),
    "int8": Format(8, True, 1 / 250, stochastic=True),
    "int4": Format(4, True, 1 / 13, stochastic=True),
}
WIRE_FORMATS = tuple(FORMATS)
WIRE_DIRECTIONS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
WIRE_SETS = {
    "safe": "int8",
    "aggressive": "dispatch=int4,combine=int8,dispatch_backward=int4,combine_backward=int8",
}
STOCHASTIC = "-sr"
SUM_FORMATS = ("model", "bfloat16", "int8")  # of gradients that ranks sum: --gradient-dtype


def row_num_bytes(name: str, size: int, itemsize: int) -> int:
    """Bytes of a row in the format called `name`: see `Format.row_num_bytes`."""
    return FORMATS[name.removesuffix(STOCHASTIC)].row_num_bytes(size, itemsize)


@dataclass(frozen=True)
class RowBytes:
    """Bytes of one row by direction."""

    dispatch: int
    combine: int
    dispatch_backward: int
    combine_backward: int

    @classmethod
    def uniform(cls, num_bytes: int) -> RowBytes:
        return cls(num_bytes, num_bytes, num_bytes, num_bytes)

    @property
    def mean(self) -> float:
        """Over the four directions."""
        return (self.dispatch + self.combine + self.dispatch_backward + self.combine_backward) / 4


@dataclass(frozen=True)
class WireSpec:
    """`--wire`, read: a format a direction, with "-sr" where gradients are rounded stochastically."""

    dispatch: str = "model"
    combine: str = "model"
    dispatch_backward: str = "model"
    combine_backward: str = "model"
    local: bool = False

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
        return RowBytes(**{d: row_num_bytes(name, size, itemsize) for d, name in self.formats.items()})


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
            forward = name.removesuffix(STOCHASTIC)
            spec = WireSpec(forward, forward, name, name)
            given.update(WIRE_DIRECTIONS)
        elif item == "local" and i > 0:
            spec = replace(spec, local=True)
        elif name in WIRE_DIRECTIONS and _is_format(value, gradient=name.endswith("_backward")):
            if name in given:
                raise UserError(f"--wire {text}: {name} is given twice")
            given.add(name)
            spec = replace(spec, **{name: value})  # type: ignore[arg-type]
        else:
            raise UserError(
                f"--wire {text}: cannot read '{item}'; give one of {', '.join((*WIRE_SETS, *WIRE_FORMATS))}, or "
                f"DIRECTION=FORMAT,... with directions {', '.join(WIRE_DIRECTIONS)}; integers of gradients may end in "
                f"{STOCHASTIC}; ,local may follow"
            )
    return spec


def _is_format(name: str, *, gradient: bool) -> bool:
    plain = name.removesuffix(STOCHASTIC)
    if plain not in FORMATS:
        return False
    return name == plain or (gradient and FORMATS[plain].stochastic)
