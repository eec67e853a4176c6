"""Wire formats: what a row is turned into before it crosses a link, and back into after it.

A row of D values is cut into blocks of 32. Each block is sent as small integers (or float8) and one bfloat16 scale, the
scales behind the payload in the same buffer:

    model  as it is                          int8  q = round(x / s), s = max|x| / 127: 8.5 bits a value
    bf16   16 bits, no blocks                int4  s = max|x| / 7, two values a byte:  4.5 bits
                                             fp8   e4m3, s = max|x| / 448:             8.5 bits

Only rows that leave their rank are encoded. What stays is exact, so a result depends, within the format's error, on
which rank an expert lives on; encoding the rows that stay would cost time and error to hide that, and save no byte.

Quantisation is straight-through: backward does not differentiate the rounding, and the gradient is sent in the format
of its own direction. A value that is not finite makes its block's scale so, hence the whole block and the loss, and the
trainer stops with its usual error: nothing has to look for it, which on a GPU would mean waiting for the device.

Block scales follow the practice of low-bit training (microscaling formats, arXiv 2310.10537; there scales are powers
of two).
"""

from __future__ import annotations

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.comm import Codec
from luffy.recipes import Recipe, parse_wire

BLOCK = 32
_SMALLEST = 2.0**-120
_LARGEST = {"int8": 127.0, "int4": 7.0, "fp8": 448.0}


@dataclass(frozen=True)
class BFloat16:
    """Rows as bfloat16."""

    def row_num_bytes(self, size: int) -> int:
        """Bytes of a row of `size` values."""
        return 2 * size

    def encode(self, rows: Tensor) -> Tensor:
        """[n, D] -> uint8 [n, 2 D]."""
        return rows.to(torch.bfloat16).contiguous().view(torch.uint8)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, 2 D] -> [n, D] of dtype."""
        return coded.contiguous().view(torch.bfloat16).to(dtype)


@dataclass(frozen=True)
class Blocks:
    """Blocks of 32 values with a bfloat16 scale each; `name` is int8, int4 or fp8.

    Error of a value x, with m the largest magnitude of its block: int8 at most m / 250, int4 m / 13, fp8 |x| / 15.
    """

    name: str

    def row_num_bytes(self, size: int) -> int:
        """Bytes of a row of `size` values, of which the last block may be short."""
        blocks = -(-size // BLOCK)
        return (blocks * BLOCK // 2 if self.name == "int4" else size) + 2 * blocks

    def encode(self, rows: Tensor) -> Tensor:
        """[n, D] -> uint8 [n, row_num_bytes(D)]."""
        D = rows.shape[1]
        blocks = F.pad(rows.to(torch.float32), (0, -D % BLOCK)).unflatten(1, (-1, BLOCK))  # [n, D / 32, 32]
        scale = (blocks.abs().amax(2) / _LARGEST[self.name]).to(torch.bfloat16)  # [n, D / 32]
        scale = scale.masked_fill(scale < _SMALLEST, 0)  # whose reciprocal would overflow; false for not-a-number
        inverse = torch.where(scale == 0, 0, scale.float().reciprocal())[:, :, None]
        scaled = (blocks * inverse).flatten(1)
        if self.name == "fp8":
            payload = scaled.clamp(-448, 448)[:, :D].to(torch.float8_e4m3fn).view(torch.uint8)
        else:
            most = _LARGEST[self.name]
            # Not a number must not reach a conversion to integers; its scale already tells of it.
            q = torch.nan_to_num(scaled).round_().clamp_(-most, most).to(torch.int8)
            if self.name == "int8":
                payload = q[:, :D].contiguous().view(torch.uint8)
            else:
                pairs = q.view(torch.uint8).unflatten(1, (-1, 2))
                payload = (pairs[:, :, 0] & 15) | (pairs[:, :, 1] << 4)
        return torch.cat([payload, scale.contiguous().view(torch.uint8)], dim=1)

    def decode(self, coded: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """uint8 [n, row_num_bytes(size)] -> [n, size] of dtype."""
        num_scales = -(-size // BLOCK)
        payload, scale = coded[:, : -2 * num_scales], coded[:, -2 * num_scales :]
        scales = scale.contiguous().view(torch.bfloat16).float()[:, :, None]  # [n, D / 32, 1]
        if self.name == "fp8":
            values = payload.contiguous().view(torch.float8_e4m3fn).float()
        elif self.name == "int8":
            values = payload.contiguous().view(torch.int8).float()
        else:  # the sign of a nibble is its bit 3
            nibbles = torch.stack([payload & 15, payload >> 4], dim=2).flatten(1).to(torch.int8)
            values = ((nibbles ^ 8) - 8).float()
        values = F.pad(values, (0, num_scales * BLOCK - values.shape[1])).unflatten(1, (-1, BLOCK))
        return (values * scales).flatten(1)[:, :size].to(dtype)


def codec(name: str) -> Codec | None:
    """The codec of a format; None for "model"."""
    if name == "model":
        return None
    return BFloat16() if name == "bf16" else Blocks(name)


@functools.cache
def codecs_of(recipe: Recipe, direction: str) -> tuple[Codec | None, Codec | None]:
    """How rows travel in `direction` ("dispatch" or "combine"), and their gradients on the way back."""
    formats = parse_wire(recipe.wire)
    return codec(formats[direction]), codec(formats[f"{direction}_backward"])
