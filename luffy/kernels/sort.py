"""A stable counting sort of choices by the group that serves them, with the way back: two launches, nothing read back.

Choices [R, K] stand in rows of K. `_count` counts each group's choices in each block of them; `_place` puts every
choice where the counts before it say. Nothing depends on the order in which blocks run: the answer is always the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from luffy.kernels.order import stable_order

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the reference serves
    triton = None

_BLOCK, _PART = 1024, 256  # choices that one program counts, and places


@dataclass(frozen=True)
class Pairs:
    """Choices [R, K] in the order of their groups, equal ones in the order of rows; all int32.

    flat [P]: row * K + choice of each. row [P]. group [P]. place [R, K]: where each choice stands, -1 for those that
    no group serves. ends [n]: where each group ends. Choices that no group serves stand behind all others, with group
    n - 1, where P is larger than ends[-1].
    """

    flat: Tensor
    row: Tensor
    group: Tensor
    place: Tensor
    ends: Tensor

    @cached_property
    def sizes(self) -> list[int]:
        """Choices of each group, on the host, which has to wait for them."""
        ends = self.ends.tolist()
        return [end - start for start, end in zip([0, *ends], ends, strict=False)]


def sort_by_group(
    ids: Tensor,
    num_groups: int,
    num_pairs: int | None = None,
    *,
    lookup: Tensor | None = None,
    first: int = 0,
    kernel: bool | None = None,
) -> Pairs:
    """ids: integers [R, K]; choice i belongs to group ids[i] - first, or with `lookup` [E] to lookup[ids[i]] - first;
    to none if ids[i] is negative or the group is not in [0, num_groups).

    num_pairs: choices that a group serves, if the host knows; else P = R * K. kernel: force the Triton kernels or the
    reference; None: the kernels on a GPU.
    """
    if kernel is None:
        kernel = triton is not None and ids.is_cuda
    n, (R, K) = num_groups, ids.shape
    if R * K >= 2**31 - _BLOCK:
        raise ValueError(f"{R * K} choices: more than int32 can count")
    if not kernel or not ids.numel():
        return _by_torch(ids, n, num_pairs, lookup, first)
    flat, row, group, unsorted = torch.empty(4, R * K, dtype=torch.int32, device=ids.device).unbind(0)
    place = torch.empty(R, K, dtype=torch.int32, device=ids.device)
    ends = torch.empty(n, dtype=torch.int32, device=ids.device)
    blocks = triton.cdiv(R * K, _BLOCK)
    counts = torch.empty(blocks, n + 1, dtype=torch.int32, device=ids.device)
    count: Any = _count[(blocks,)]
    count(
        ids.contiguous(), ids if lookup is None else lookup, unsorted, counts, R * K, first, n,
        LOOKUP=lookup is not None, BINS=triton.next_power_of_2(n + 2), BLOCK=_BLOCK, num_warps=4,
    )  # fmt: skip
    put: Any = _place[(triton.cdiv(R * K, _PART),)]
    put(
        unsorted, counts, flat, row, group, place, ends, R * K, n, blocks,
        K=K, BLOCK=_BLOCK, PART=_PART, num_warps=4,
    )  # fmt: skip
    P = R * K if num_pairs is None else num_pairs
    return Pairs(flat[:P], row[:P], group[:P], place, ends)


def _by_torch(ids: Tensor, n: int, num_pairs: int | None, lookup: Tensor | None, first: int) -> Pairs:
    K = ids.shape[1]
    group = ids.long() if lookup is None else lookup.long()[ids.long().clamp_min(0)]
    group = group - first
    group = torch.where((ids >= 0) & (group >= 0) & (group < n), group, n).flatten()
    order = stable_order(group, n + 1)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    place = place.masked_fill(group == n, -1).view(ids.shape)
    counts = torch.zeros(n + 1, dtype=torch.int64, device=ids.device).index_add_(0, group, torch.ones_like(group))
    order = order[:num_pairs]
    flat, row, at = (t.to(torch.int32) for t in (order, order // max(K, 1), group[order].clamp_max(n - 1)))
    return Pairs(flat, row, at, place.to(torch.int32), counts[:n].cumsum(0, dtype=torch.int32))


if triton is not None:

    @triton.jit(do_not_specialize=["size", "first", "n"])
    def _count(
        ids, table, groups, counts, size, first, n, LOOKUP: tl.constexpr, BINS: tl.constexpr, BLOCK: tl.constexpr
    ):  # fmt: skip
        """Group of each choice, n for none; how many of each group there are in this block."""
        block = tl.program_id(0)
        at = block * BLOCK + tl.arange(0, BLOCK)
        inside = at < size
        group = tl.load(ids + at, mask=inside, other=-1).to(tl.int32)
        chosen = group >= 0
        if LOOKUP:
            group = tl.load(table + tl.where(chosen, group, 0), mask=inside, other=0).to(tl.int32)
        group -= first
        group = tl.where(chosen & (group >= 0) & (group < n), group, n)
        tl.store(groups + at, group, mask=inside)
        bins = tl.arange(0, BINS)
        tl.store(counts + block * (n + 1) + bins, tl.histogram(tl.where(inside, group, n + 1), BINS), mask=bins <= n)

    @triton.jit(do_not_specialize=["size", "n", "blocks"])
    def _place(
        groups, counts, flat, row, group_of, place, ends, size, n, blocks,
        K: tl.constexpr, BLOCK: tl.constexpr, PART: tl.constexpr,
    ):  # fmt: skip
        first = tl.program_id(0) * PART
        block = first // BLOCK
        at = first + tl.arange(0, PART)
        inside = at < size
        group = tl.load(groups + at, mask=inside, other=n + 1)
        position = tl.zeros((PART,), dtype=tl.int32)
        earlier = 0  # choices of the groups before these
        for e in range(0, n + 1, 16):
            column = e + tl.arange(0, 16)
            total = tl.zeros((16,), dtype=tl.int32)
            before = tl.zeros((16,), dtype=tl.int32)
            for c in range(0, blocks, 128):
                other = c + tl.arange(0, 128)
                known = (other < blocks)[:, None] & (column <= n)[None, :]
                found = tl.load(counts + other[:, None] * (n + 1) + column[None, :], mask=known, other=0)
                total += tl.sum(found, axis=0)
                before += tl.sum(tl.where((other < block)[:, None], found, 0), axis=0)
            end = earlier + tl.cumsum(total, axis=0)
            if first == 0:
                tl.store(ends + column, end, mask=column < n)
            start = end - total + before
            position += tl.sum(tl.where(group[:, None] == column[None, :], start[None, :], 0), axis=1)
            earlier += tl.sum(total, axis=0)
        for c in range(block * BLOCK, first + PART, 32):  # those of the same group, earlier in this block
            near = c + tl.arange(0, 32)
            same = tl.load(groups + near, mask=near < size, other=n + 1)[None, :] == group[:, None]
            position += tl.sum((same & (near[None, :] < at[:, None])).to(tl.int32), axis=1)
        tl.store(flat + position, at, mask=inside)
        tl.store(row + position, at // K, mask=inside)
        tl.store(group_of + position, tl.minimum(group, n - 1), mask=inside)
        tl.store(place + at, tl.where(group < n, position, -1), mask=inside)
