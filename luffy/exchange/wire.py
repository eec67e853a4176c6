"""Codecs: what a row is turned into before it crosses a link, and back into after it.

A codec writes rows in one format of luffy.wire_format. Integers are cut into blocks of 32 values; a block is sent with
one bfloat16 scale, max|x| / 32767, 127 or 7, the scales behind the payload in the same buffer.

Two more codecs wrap one, and are each other's partner: `GatheringCodec` picks the rows that it encodes by index,
`SummingCodec` adds the rows that it decodes into others by index. Dispatch gathers forward and sums backward, combine
sums forward and gathers backward, so that on a GPU either is one pass over the data.

Quantisation is straight-through: backward does not differentiate the rounding, and the gradient is sent in the format
of its own direction. A value that is not finite makes its block's scale so, hence the whole block and the loss, and the
trainer stops with its usual error: nothing has to look for it, which on a GPU would mean waiting for the device.

Which rows are rounded: those that leave their rank; with `local` all. Rounding a row that stays saves no byte. Without
it, though, a result depends, within the format's error, on which rank a token and its experts live on.

Block scales follow the practice of low-bit training (microscaling formats, arXiv 2310.10537; there scales are powers
of two).
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from luffy.comm import Codec
from luffy.kernels.wire_rows import add_rows, aligned, decode_rows, encode_rows
from luffy.wire_format import STOCHASTIC, WIRE_DIRECTIONS, WireSpec


class RowCodec(Codec, Protocol):
    """A codec that can gather on its way out and add on its way in."""

    def encode(self, rows: Tensor, index: Tensor | None = None) -> Tensor: ...

    def add(self, total: Tensor, index: Tensor, coded: Tensor, dtype: torch.dtype) -> Tensor:
        """total [T, D] += rows [n, D] (of dtype, where that matters) at index, in place."""
        ...


def _picked(rows: Tensor, index: Tensor | None) -> Tensor:
    return rows if index is None else rows[index]


@dataclass(frozen=True)
class AsTheyAre:
    """Rows as they are, for a direction whose partner is coded."""

    def encode(self, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """[n, D] -> uint8 [n, itemsize D]."""
        return _picked(rows, index).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, itemsize size] -> [n, size] of dtype."""
        return aligned(coded).view(dtype)

    def add(self, total: Tensor, index: Tensor, coded: Tensor, dtype: torch.dtype) -> Tensor:
        return total.index_add_(0, index, self.decode(coded, total.shape[1], dtype).to(total.dtype))


@dataclass(frozen=True)
class BFloat16:
    """Rows as bfloat16."""

    def encode(self, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """[n, D] -> uint8 [n, 2 D]."""
        return _picked(rows, index).to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, 2 D] -> [n, D] of dtype."""
        return aligned(coded).view(torch.bfloat16).to(dtype)

    def add(self, total: Tensor, index: Tensor, coded: Tensor, dtype: torch.dtype) -> Tensor:
        return total.index_add_(0, index, self.decode(coded, total.shape[1], total.dtype))


@dataclass(frozen=True)
class Integers:
    """Blocks of 32 integers with a scale each; `name` is int16, int8 or int4. seed: round stochastically.

    Error of a value, with m the largest magnitude of its block: at most m / 65000, m / 250, m / 13; twice
    that if stochastic.
    """

    name: str
    seed: int | None = None

    def encode(self, rows: Tensor, index: Tensor | None = None) -> Tensor:
        """[n, D] -> uint8 [n, row_num_bytes]."""
        return encode_rows(rows, index, self.name, self.seed)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, row_num_bytes] -> [n, size] of dtype."""
        return decode_rows(coded, size, self.name, dtype)

    def add(self, total: Tensor, index: Tensor, coded: Tensor, dtype: torch.dtype) -> Tensor:
        return add_rows(total, index, coded, self.name)


@dataclass(frozen=True)
class GatheringCodec:
    """Encodes rows[index], index int64 [n]; decodes as `codec` does."""

    codec: RowCodec
    index: Tensor

    def encode(self, rows: Tensor) -> Tensor:
        """[T, D] -> uint8 [n, width]."""
        return self.codec.encode(rows, self.index)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, width] -> [n, size] of dtype."""
        return self.codec.decode(coded, size, dtype)


@dataclass(frozen=True)
class SummingCodec:
    """Encodes as `codec` does; decodes to sums [num_rows, size], where index, int64 [n], says who gets each row."""

    codec: RowCodec
    index: Tensor
    num_rows: int

    def encode(self, rows: Tensor) -> Tensor:
        """[n, D] -> uint8 [n, width]."""
        return self.codec.encode(rows)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, width] -> [num_rows, size], in float32 at least."""
        total = torch.zeros(self.num_rows, size, dtype=torch.promote_types(dtype, torch.float32), device=coded.device)
        return self.codec.add(total, self.index, coded, dtype)


def row_codec(name: str, seed: int = 0) -> RowCodec:
    """The codec of a format; `seed` counts where it rounds stochastically."""
    plain = name.removesuffix(STOCHASTIC)
    if plain == "model":
        return AsTheyAre()
    if plain == "bf16":
        return BFloat16()
    return Integers(plain, seed if name.endswith(STOCHASTIC) else None)


@dataclass(frozen=True)
class WireCodecs:
    """How rows travel one way, and their gradients back. coded: not both as they are. local: rows that stay, too."""

    forward: RowCodec
    backward: RowCodec
    coded: bool = True
    local: bool = False

    @property
    def plain(self) -> tuple[Codec | None, Codec | None]:
        """For all_to_all_rows, of rows that are [n, D] on both sides."""
        return (self.forward, self.backward) if self.coded else (None, None)

    def gathering(self, index: Tensor, num_rows: int) -> tuple[Codec, Codec]:
        """For all_to_all_rows, given rows [num_rows, D], of which those at index are sent."""
        return GatheringCodec(self.forward, index), SummingCodec(self.backward, index, num_rows)

    def adding(self, index: Tensor, num_rows: int) -> tuple[Codec, Codec]:
        """For all_to_all_rows, to get sums [num_rows, D] of what arrives, by index."""
        return SummingCodec(self.forward, index, num_rows), GatheringCodec(self.backward, index)

    def staying(self, rows: Tensor) -> Tensor:
        """Rows that do not leave: as they are or, with `local`, as if they had."""
        return _Round.apply(rows, self.forward, self._other_draw()) if self.coded and self.local else rows

    def _other_draw(self) -> RowCodec:
        """The backward codec for rows that stay, whose places in their message are others' as well: another draw."""
        back = self.backward
        if isinstance(back, Integers) and back.seed is not None:
            return replace(back, seed=back.seed ^ 0x55555555)
        return back


AS_THEY_ARE = WireCodecs(AsTheyAre(), AsTheyAre(), coded=False)


class _Round(torch.autograd.Function):
    """What a trip over a link does to rows [n, D], and to their gradients on the way back."""

    @staticmethod
    def forward(ctx, rows: Tensor, forward: RowCodec, backward: RowCodec) -> Tensor:
        ctx.backward_codec = backward
        return forward.decode(forward.encode(rows), rows.shape[1], rows.dtype)

    @staticmethod
    def backward(ctx, grad: Tensor):
        codec = ctx.backward_codec
        return codec.decode(codec.encode(grad), grad.shape[1], grad.dtype), None, None


@dataclass
class Draws:
    """Where stochastic rounding is in a run: counts that are the same when a step is repeated. `rank`: of the world."""

    rank: int
    step: int = 0
    _taken: dict[tuple[int, str], int] = field(default_factory=dict)

    def begin(self, step: int) -> None:
        """Before the first micro-batch of a step."""
        self.step = step
        self._taken.clear()

    def seed(self, layer: int, direction: str) -> int:
        """31 bits, others for each micro-batch of the step."""
        count = self._taken[layer, direction] = self._taken.get((layer, direction), 0) + 1
        x = 0
        for part in (self.rank, self.step, count, layer, WIRE_DIRECTIONS.index(direction)):
            x = (x ^ part) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & (2**64 - 1)
            x ^= x >> 29
        return x >> 33


@dataclass
class Transport:
    """In which formats the rows of one layer cross links. Each layer has its own; `spec` may change between steps."""

    spec: WireSpec
    draws: Draws
    layer: int

    @property
    def codes(self) -> bool:
        """Whether any direction changes rows."""
        return any(name != "model" for name in self.spec.formats.values())

    def codecs(self, direction: str) -> WireCodecs:
        """How rows travel in `direction` ("dispatch" or "combine"), and their gradients on the way back."""
        there, back = self.spec.format(direction), self.spec.format(f"{direction}_backward")
        if there == back == "model":
            return AS_THEY_ARE
        seed = self.draws.seed(self.layer, f"{direction}_backward") if back.endswith(STOCHASTIC) else 0
        return WireCodecs(row_codec(there), row_codec(back, seed), local=self.spec.local)
