"""Rows of integers in blocks of 32 for the wire: gather and encode in one pass, decode and add in another.

A block of 32 values is sent as integers q and one bfloat16 scale s, the smallest with |x| <= s * largest, so that
nothing is clipped: x is about q * s. A coded row is its payload (two values a byte for int4, the even one low; little
endian for int16) and behind it the scales of its blocks. Two operations, each the other's partner in the backward pass:

    encode_rows   out[i] = code(x[index[i]])             rows into the send buffer, by token
    add_rows      total[index[i]] += value(coded[i])     received rows into the stream, by token

The torch reference works through 128k values at a time, which stay in the processor's cache, in few passes. The Triton
kernels round alike, to the bit (products are not contracted, the reciprocal is correctly rounded); only `add_rows` may
differ from the reference, where more than two rows meet in a token, in the order of their addition.

Random rounding adds to x / s a number in [0, 1) that is a hash of the seed and of the value's place, and rounds down:
the mean over seeds is x, and a repeated step repeats itself.

A block with a value that is not finite has such a scale; its integers say nothing.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from luffy.wire_format import BLOCK, row_num_bytes

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference serves
    triton = None

LARGEST = {"int16": 32767, "int8": 127, "int4": 7}
_SMALLEST = 2.0**-120  # a scale below it counts as zero, since its reciprocal would overflow
_CHUNK = 128 * 1024  # values that the reference looks at at once
_MAGIC = 12582912.0  # 1.5 * 2**23: added and taken away again, it rounds to the nearest integer, ties to even


def encode_rows(
    x: Tensor, index: Tensor | None, name: str, seed: int | None = None, kernel: bool | None = None
) -> Tensor:
    """x [T, D] of any floating dtype, index int64 [n] (None: all rows) -> uint8 [n, bytes of a row].

    seed: round at random. kernel: force the Triton kernel or the reference; None: the kernel on a GPU.
    """
    n = x.shape[0] if index is None else index.shape[0]
    out = torch.empty(n, row_num_bytes(name, x.shape[1], 0), dtype=torch.uint8, device=x.device)
    if not out.numel():
        return out
    if _use_kernel(x, kernel):
        _encode_by_kernel(x, index, name, seed, out)
        return out
    step = rows_at_once(x, n)
    for start in range(0, n, step):
        rows = x[start : start + step] if index is None else x.index_select(0, index[start : start + step])
        _encode_chunk(rows, name, None if seed is None else (seed, start), out[start : start + step])
    return out


def decode_rows(coded: Tensor, size: int, name: str, dtype: torch.dtype, kernel: bool | None = None) -> Tensor:
    """uint8 [n, bytes of a row], rows of any stride -> [n, size] of dtype."""
    out = torch.empty(coded.shape[0], size, dtype=dtype, device=coded.device)
    if not out.numel():
        return out
    if _use_kernel(out, kernel):
        _decode_by_kernel(coded, None, name, out)
        return out
    step = rows_at_once(out, out.shape[0])
    for part, rows in zip(coded.split(step), out.split(step), strict=True):
        _decode_chunk(part, size, name, rows)
    return out


def add_rows(total: Tensor, index: Tensor, coded: Tensor, name: str, kernel: bool | None = None) -> Tensor:
    """total [T, D], float32 or float64, += the rows of coded at index, int64 [n]; in place."""
    if not coded.numel():
        return total
    if _use_kernel(total, kernel):
        _decode_by_kernel(coded, index, name, total)
        return total
    step = rows_at_once(total, coded.shape[0])
    for part, at in zip(coded.split(step), index.split(step), strict=True):
        total.index_add_(0, at, decode_rows(part, total.shape[1], name, total.dtype, kernel=False))
    return total


def rows_at_once(x: Tensor, num_rows: int) -> int:
    """How many of num_rows rows as wide as those of x to look at together."""
    return num_rows if x.is_cuda else max(1, _CHUNK // x.shape[1])


def _use_kernel(x: Tensor, kernel: bool | None) -> bool:
    return (triton is not None and x.is_cuda and x.dtype != torch.float64) if kernel is None else kernel


def largest_of_blocks(rows: Tensor) -> tuple[Tensor, Tensor]:
    """rows [n, D] -> the same as float32 in blocks [n, D / 32, 32], the last filled with zeros; their largest |x|."""
    rows = rows.to(torch.float32)
    blocks = (F.pad(rows, (0, -rows.shape[1] % BLOCK)) if rows.shape[1] % BLOCK else rows).unflatten(1, (-1, BLOCK))
    return blocks, blocks.abs().amax(2)


def scale_bits(most: Tensor, largest: float) -> tuple[Tensor, Tensor]:
    """most float32 -> the smallest bfloat16 that is not below most / largest, as int32 bits, and one over it."""
    bits = (most * (1 / largest)).view(torch.int32).clamp_max(0x7FFF0000)
    bits = (bits + 0xFFFF) >> 16
    bits = torch.where(bits > 0x7F80, 0x7FC0, bits)  # one way to write that it is no number
    scale = (bits << 16).view(torch.float32)
    small = scale < _SMALLEST
    return torch.where(small, 0, bits), torch.where(small, 0, scale.reciprocal())


def bits_as_bytes(bits: Tensor) -> Tensor:
    """int32 [n, m] of bfloat16 bits -> uint8 [n, 2 m]."""
    return bits.to(torch.int16).view(torch.uint8)


def aligned(columns: Tensor) -> Tensor:
    """Some columns of a message as bytes that can be viewed as another dtype: copied, unless they are all of it.

    (Columns of a single row count as contiguous wherever they begin and end.)
    """
    whole = columns.stride() == (columns.shape[1], 1) and columns.storage_offset() == 0
    return columns if whole else columns.clone(memory_format=torch.contiguous_format)


def scales_of(coded: Tensor, num_blocks: int) -> Tensor:
    """The scales behind a coded row, float32 [n, num_blocks, 1]."""
    raw = aligned(coded[:, -2 * num_blocks :]).view(torch.bfloat16)
    return raw.to(torch.float32)[:, :, None]


def _encode_chunk(rows: Tensor, name: str, draw: tuple[int, int] | None, out: Tensor) -> None:
    """draw: the seed, and the place of the first row among all."""
    D = rows.shape[1]
    blocks, most = largest_of_blocks(rows)
    bits, inverse = scale_bits(most, LARGEST[name])
    scaled = (blocks * inverse[:, :, None]).flatten(1)  # [n, D, to whole blocks]
    if draw is None:
        scaled.round_()
    else:
        scaled.add_(_uniform(*draw, rows.shape[0], D, scaled.shape[1], rows.device)).floor_()
        scaled.clamp_(-LARGEST[name], LARGEST[name])  # 127 and almost one is 128 in float32
    # Not a number must not reach a conversion to integers. On a GPU, asking whether there is one would mean waiting.
    if rows.is_cuda or not bool(torch.isfinite(most).all()):
        scaled = torch.nan_to_num_(scaled, 0, 0, 0)
    if name == "int16":
        payload = scaled[:, :D].to(torch.int16).view(torch.uint8)
    else:
        payload = scaled.to(torch.int8)
        if name == "int8":
            payload = payload[:, :D].view(torch.uint8)
        else:  # as one int16: the even value in the low byte
            pairs = payload.view(torch.int16)
            payload = ((pairs & 15) | ((pairs >> 4) & 0xF0)).to(torch.uint8)
    out[:, : payload.shape[1]] = payload
    out[:, payload.shape[1] :] = bits_as_bytes(bits)


def _decode_chunk(coded: Tensor, size: int, name: str, out: Tensor) -> None:
    num_blocks = -(-size // BLOCK)
    scales = scales_of(coded, num_blocks)
    payload = coded[:, : coded.shape[1] - 2 * num_blocks]
    if name == "int16":
        values = aligned(payload).view(torch.int16)
    elif name == "int8":
        values = payload.view(torch.int8)
    else:
        pairs = payload.to(torch.int16)
        pairs = (pairs | (pairs << 4)) & 0x0F0F
        values = (pairs.view(torch.int8) ^ 8) - 8  # the sign of a nibble is its bit 3
    wide = values.to(torch.float32)
    wide = F.pad(wide, (0, num_blocks * BLOCK - wide.shape[1])) if wide.shape[1] % BLOCK else wide
    torch.mul(wide.unflatten(1, (-1, BLOCK)), scales, out=wide.unflatten(1, (-1, BLOCK)))
    out.copy_(wide[:, :size])


def _uniform(seed: int, first_row: int, num_rows: int, size: int, width: int, device: torch.device) -> Tensor:
    """float32 [num_rows, width]: a number in [0, 1) for each place of rows of `size` values, of 24 random bits.

    The hash is Wellons' lowbias32, in wrapping 32-bit arithmetic.
    """
    row = torch.arange(first_row, first_row + num_rows, device=device)[:, None]
    x = (row * size + torch.arange(width, device=device) + seed).to(torch.int32)
    x = _mixed(x)
    return ((x >> 8) & 0xFFFFFF).to(torch.float32).mul_(2.0**-24)


def _mixed(x: Tensor) -> Tensor:
    x = x ^ ((x >> 16) & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ ((x >> 15) & 0x1FFFF)
    x = x * -0x7B935975  # 0x846CA68B
    return x ^ ((x >> 16) & 0xFFFF)


if triton is not None:

    @triton.jit
    def _round(scaled, place, seed, LARGEST: tl.constexpr, RANDOM: tl.constexpr, MAGIC: tl.constexpr):
        """[n] float32 -> int32, to nearest even or at random; 0 for not a number."""
        scaled = tl.where(scaled == scaled, scaled, 0.0)
        if RANDOM:
            x = (place + seed).to(tl.int32)
            x = x ^ ((x >> 16) & 0xFFFF)
            x = x * 0x7FEB352D
            x = x ^ ((x >> 15) & 0x1FFFF)
            x = x * -0x7B935975
            x = x ^ ((x >> 16) & 0xFFFF)
            draw = ((x >> 8) & 0xFFFFFF).to(tl.float32) * 5.9604644775390625e-08
            rounded = tl.floor(scaled + draw)
            rounded = tl.minimum(tl.maximum(rounded, -LARGEST), LARGEST)
        else:
            rounded = (scaled + MAGIC) - MAGIC
        return rounded.to(tl.int32)

    @triton.jit
    def _scale(most, bad, LARGEST: tl.constexpr, SMALLEST: tl.constexpr):
        """[blocks] largest |x|, whether any is no number -> int32 bits of the scale, float32 one over it."""
        bits = (most * (1.0 / LARGEST)).to(tl.int32, bitcast=True)
        bits = (tl.minimum(bits, 0x7FFF0000) + 0xFFFF) >> 16
        bits = tl.where(bad > 0, 0x7FC0, bits)
        scale = (bits << 16).to(tl.float32, bitcast=True)
        small = scale < SMALLEST
        inverse = tl.where(small, 0.0, tl.div_rn(tl.full(scale.shape, 1.0, tl.float32), tl.where(small, 1.0, scale)))
        return tl.where(small, 0, bits), inverse

    @triton.jit
    def _encode_kernel(
        x, index, out, D, stride, width, seed,
        BLOCKS: tl.constexpr, BITS: tl.constexpr, LARGEST: tl.constexpr, GATHER: tl.constexpr, RANDOM: tl.constexpr,
        SMALLEST: tl.constexpr, MAGIC: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        source = row
        if GATHER:
            source = tl.load(index + row)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        num_blocks = (D + 31) // 32
        first, to = x + source * stride, out + row * width
        column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        value = tl.load(first + column, mask=column < D, other=0.0).to(tl.float32)
        most = tl.max(tl.abs(value), axis=1)
        bad = tl.max((value != value).to(tl.int32), axis=1)
        bits, inverse = _scale(most, bad, LARGEST, SMALLEST)
        q = _round(value * inverse[:, None], row * D + column, seed, LARGEST, RANDOM, MAGIC)
        if BITS == 4:
            low, high = tl.split(tl.reshape(q, (BLOCKS, 16, 2)))
            pair = block[:, None] * 16 + tl.arange(0, 16)[None, :]
            tl.store(to + pair, ((low & 15) | ((high & 15) << 4)).to(tl.uint8), mask=pair < num_blocks * 16)
            payload = num_blocks * 16
        elif BITS == 8:
            tl.store(to + column, (q & 255).to(tl.uint8), mask=column < D)
            payload = D
        else:
            tl.store(to + 2 * column, (q & 255).to(tl.uint8), mask=column < D)
            tl.store(to + 2 * column + 1, ((q >> 8) & 255).to(tl.uint8), mask=column < D)
            payload = 2 * D
        tl.store(to + payload + 2 * block, (bits & 255).to(tl.uint8), mask=block < num_blocks)
        tl.store(to + payload + 2 * block + 1, (bits >> 8).to(tl.uint8), mask=block < num_blocks)

    @triton.jit
    def _decode_kernel(
        coded, index, out, D, stride,
        BLOCKS: tl.constexpr, BITS: tl.constexpr, ADD: tl.constexpr,
    ):  # fmt: skip
        row = tl.program_id(0).to(tl.int64)
        target = row
        if ADD:
            target = tl.load(index + row)
        block = tl.program_id(1) * BLOCKS + tl.arange(0, BLOCKS)
        num_blocks = (D + 31) // 32
        payload = D
        if BITS == 4:
            payload = num_blocks * 16
        elif BITS == 16:
            payload = 2 * D
        start = coded + row * stride
        low = tl.load(start + payload + 2 * block, mask=block < num_blocks, other=0).to(tl.int32)
        high = tl.load(start + payload + 2 * block + 1, mask=block < num_blocks, other=0).to(tl.int32)
        scale = ((low << 16) | (high << 24)).to(tl.float32, bitcast=True)
        column = block[:, None] * 32 + tl.arange(0, 32)[None, :]
        inside = column < D
        if BITS == 4:
            byte = tl.load(start + column // 2, mask=inside, other=0).to(tl.int32)
            q = (byte >> (4 * (column % 2))) & 15
            q = (q ^ 8) - 8
        elif BITS == 8:
            q = tl.load(start + column, mask=inside, other=0).to(tl.int32)
            q = (q ^ 128) - 128
        else:
            q = tl.load(start + 2 * column, mask=inside, other=0).to(tl.int32)
            q = q | (tl.load(start + 2 * column + 1, mask=inside, other=0).to(tl.int32) << 8)
            q = (q ^ 32768) - 32768
        value = q.to(tl.float32) * scale[:, None]
        to = out + target * D + column
        if ADD:
            tl.atomic_add(to, value, mask=inside, sem="relaxed")
        else:
            tl.store(to, value.to(out.dtype.element_ty), mask=inside)


_BITS = {"int16": 16, "int8": 8, "int4": 4}
_BLOCKS = 32  # of 32 values that one program looks at


def _grid(num_rows: int, size: int) -> tuple[int, int, int]:
    """(rows, programs a row, blocks a program)."""
    num_blocks = -(-size // BLOCK)
    blocks = min(_BLOCKS, 1 << (num_blocks - 1).bit_length())
    return num_rows, -(-num_blocks // blocks), blocks


def _encode_by_kernel(x: Tensor, index: Tensor | None, name: str, seed: int | None, out: Tensor) -> None:
    x = x if x.stride(1) == 1 else x.contiguous()
    rows, parts, blocks = _grid(out.shape[0], x.shape[1])
    launch: Any = _encode_kernel[(rows, parts)]
    launch(
        x, out if index is None else index, out, x.shape[1], x.stride(0), out.stride(0), seed or 0,
        BLOCKS=blocks, BITS=_BITS[name], LARGEST=float(LARGEST[name]), GATHER=index is not None,
        RANDOM=seed is not None, SMALLEST=_SMALLEST, MAGIC=_MAGIC, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip


def _decode_by_kernel(coded: Tensor, index: Tensor | None, name: str, out: Tensor) -> None:
    coded = coded if coded.stride(1) == 1 else coded.contiguous()
    rows, parts, blocks = _grid(coded.shape[0], out.shape[1])
    launch: Any = _decode_kernel[(rows, parts)]
    launch(
        coded, coded if index is None else index, out, out.shape[1], coded.stride(0),
        BLOCKS=blocks, BITS=_BITS[name], ADD=index is not None, num_warps=2, enable_fp_fusion=False,
    )  # fmt: skip
