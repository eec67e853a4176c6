"""Weights in MXFP4 (GPT-OSS as published) and in fp8 by blocks (DeepSeek-V3), read as the numbers that they stand for.

They are dequantised while they are read, experts of this rank alone, and trained and saved in the folder's other type:
a folder that comes out is not quantised.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from luffy.hf.files import Entry

METHODS = ("mxfp4", "fp8")
BLOCKS, SCALES, INVERSE = "_blocks", "_scales", "_scale_inv"
# OCP Microscaling Formats 1.0: sign, two bits of exponent, one of mantissa.
_FP4 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)


def method_of(config: Any) -> str | None:
    """How a configuration says that weights are quantised; None: they are not."""
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    name = found.get("quant_method") if isinstance(found, dict) else getattr(found, "quant_method", None)
    return str(getattr(name, "value", name))


def folded(entries: dict[str, Entry]) -> dict[str, Entry]:
    """Entries of a folder with one for each quantised weight, of its own shape, in place of its parts."""
    out = dict(entries)
    for name, entry in entries.items():
        if name.endswith(BLOCKS) and (scales := name.removesuffix(BLOCKS) + SCALES) in entries:
            experts, rows, groups, half = entry.shape
            out[name.removesuffix(BLOCKS)] = replace(entry, shape=(experts, groups * half * 2, rows))
            del out[name], out[scales]
        elif name.endswith(INVERSE) and name.removesuffix(INVERSE) in entries:
            del out[name]
    return out


def from_mxfp4(blocks: Tensor, scales: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """blocks [E, out, G, 16] of two values a byte, scales [E, out, G], powers of two -> [E, 32 G, out]."""
    table = torch.tensor(_FP4, dtype=dtype)
    values = torch.stack([table[(blocks & 15).int()], table[(blocks >> 4).int()]], dim=-1).flatten(-2)
    return torch.ldexp(values, (scales.int() - 127)[..., None]).to(dtype).flatten(-2).transpose(1, 2)


def from_fp8(weight: Tensor, scale_inv: Tensor, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """weight [out, in] in fp8, scale_inv [out / b, in / b] (last blocks may be smaller) -> [out, in]."""
    rows, columns = (_block(n, blocks) for n, blocks in zip(weight.shape, scale_inv.shape, strict=True))
    scale = scale_inv.float().repeat_interleave(rows, 0)[: weight.shape[0]]
    scale = scale.repeat_interleave(columns, 1)[:, : weight.shape[1]]
    return (weight.float() * scale).to(dtype)


def _block(size: int, blocks: int) -> int:
    """Length of a block: 128, as all published folders have it, unless the numbers of blocks say otherwise."""
    return 128 if -(-size // 128) == blocks else -(-size // blocks)
