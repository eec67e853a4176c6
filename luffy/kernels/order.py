"""Sorting by small numbers: ranks and experts, of which there are few.

A GPU sorts integers by their digits, one pass a byte, each a kernel or two: eight passes for int64, one where the
numbers fit into a byte. There the launches, not the rows, are what a sort costs.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stable_order(numbers: Tensor, bound: int) -> Tensor:
    """What sorts `numbers`, integers in [0, bound) of shape [n], equal ones in their order: int64 [n]."""
    narrow = next((d for d in (torch.uint8, torch.int16, torch.int32) if bound <= torch.iinfo(d).max + 1), torch.int64)
    return numbers.to(narrow).argsort(stable=True)
