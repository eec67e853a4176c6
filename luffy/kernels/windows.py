"""Windows of copies that may share a row: every copy of an expert, in the order of time, W at a time.

There is no sort. Copies of one expert are to stand in the order of time, in which tokens can be visited from the start,
so counting suffices: `_count` counts each expert's copies in each block of tokens, and `_place` puts every copy where
the counts before it say. Where windows keep within a sequence, each sequence has a part of the table to itself. Nothing
is read back by the host.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luffy.data.batch import Layout

try:
    import triton
    import triton.language as tl
except ImportError:  # no Triton for this platform: the torch path serves
    triton = None

BLOCK_TOKENS = 128  # tokens that one program looks at


@dataclass(frozen=True)
class Question:
    """What one layer asks. x [T, D]: rows of any length. ids, rank int64 [T, K], is_copy bool [T, K]: as CopyKeys.

    local, by_sequence, pairs: which copies may be condensed, and among whom (luffy.exchange.condense.find_groups).
    """

    x: Tensor
    ids: Tensor
    rank: Tensor
    is_copy: Tensor
    layout: Layout
    num_experts: int
    ep_rank: int
    threshold: float
    window: int
    causal: bool
    nearest: bool
    local: bool
    by_sequence: bool
    pairs: bool


@dataclass(frozen=True)
class Answer:
    """[T, K] each; see luffy.exchange.condense.Condensed."""

    leader: Tensor
    sent: Tensor
    shared: Tensor


def find_windows(q: Question) -> tuple[Tensor, Answer]:
    """Copies of each window, int32 [windows, W], -1 where empty; answers, those of copies in no window filled in."""
    (T, K), E, W, layout, device = q.ids.shape, q.num_experts, q.window, q.layout, q.x.device
    segments, longest = (layout.num_sequences, layout.max_length) if q.by_sequence else (1, T)
    num_windows = T * K // W + segments * E  # an upper bound that needs no read-back
    if num_windows * W >= 2**31:
        raise ValueError(f"{T * K} copies in windows of {W}, {segments * E} groups: more than int32 can count")
    table = torch.empty(num_windows, W, dtype=torch.int32, device=device)
    leader = torch.empty(T, K, dtype=torch.int64, device=device)
    sent, shared = (torch.empty(T, K, dtype=torch.bool, device=device) for _ in range(2))
    answer = Answer(leader, sent, shared)
    chunks = -(-longest // BLOCK_TOKENS)
    programs = segments * chunks
    if programs == 0:
        return table.fill_(-1), answer
    counts = torch.empty(programs, E, dtype=torch.int32, device=device)
    ids, rank, is_copy = (t.contiguous() for t in (q.ids, q.rank, q.is_copy.view(torch.uint8)))
    # With all in one segment `starts` is not read, in sequences `in_time` is not: each then stands for the other.
    order = layout.cu_seqlens if q.by_sequence else layout.tokens_in_time
    shape = {
        "K": K, "BLOCK_T": BLOCK_TOKENS, "BLOCK_E": min(32, max(4, triton.next_power_of_2(E))),
        "BY_SEQUENCE": q.by_sequence, "LOCAL": q.local, "PAIRS": q.pairs, "num_warps": 4,
    }  # fmt: skip
    each = -(-table.numel() // programs)
    count: Any = _count[(programs,)]
    count(
        ids, rank, is_copy, order, counts, table, leader, sent.view(torch.uint8), shared.view(torch.uint8),
        T, chunks, table.numel(), each, E, q.ep_rank, **shape,
    )  # fmt: skip
    place: Any = _place[(programs,)]
    place(ids, rank, is_copy, order, counts, table, T, chunks, E, q.ep_rank, W=W, BLOCK_C=64, **shape)
    return table, answer


if triton is not None:

    @triton.jit
    def _tokens(order, num_tokens, segment, chunk, BLOCK_T: tl.constexpr, BY_SEQUENCE: tl.constexpr):
        """(tokens of this block in the order of time, which of them there are)."""
        index = chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        if BY_SEQUENCE:
            first = tl.load(order + segment)
            inside = index < tl.load(order + segment + 1) - first
            token = tl.where(inside, first + index, 0)
        else:
            inside = index < num_tokens
            token = tl.load(order + index, mask=inside, other=0)
        return token, inside

    @triton.jit
    def _expert(
        ids, rank, is_copy, token, inside, ep_rank, k: tl.constexpr, K: tl.constexpr, LOCAL: tl.constexpr,
        PAIRS: tl.constexpr,
    ):  # fmt: skip
        """Expert of choice k of each token; -1 where it cannot be condensed."""
        here = tl.load(rank + token * K + k, mask=inside, other=-1)
        alone = inside & (tl.load(is_copy + token * K + k, mask=inside, other=0) != 0)
        if not LOCAL:
            alone = alone & (here != ep_rank)
        if not PAIRS:  # exactly one expert at its rank
            for other in tl.static_range(K):
                if other != k:
                    alone = alone & (tl.load(rank + token * K + other, mask=inside, other=-2) != here)
        expert = tl.load(ids + token * K + k, mask=inside, other=-1)
        return tl.where(alone, expert, -1).to(tl.int32)

    @triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_places", "each", "ep_rank"])
    def _count(
        ids, rank, is_copy, order, counts, table, leader, sent, shared,
        num_tokens, num_chunks, num_places, each, E, ep_rank,
        K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BY_SEQUENCE: tl.constexpr, LOCAL: tl.constexpr,
        PAIRS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        token, inside = _tokens(order, num_tokens, program // num_chunks, program % num_chunks, BLOCK_T, BY_SEQUENCE)
        for k in tl.static_range(K):
            expert = _expert(ids, rank, is_copy, token, inside, ep_rank, k, K, LOCAL, PAIRS)
            name, rest = token * K + k, inside & (expert < 0)
            tl.store(leader + name, name.to(tl.int64), mask=rest)
            tl.store(sent + name, tl.load(is_copy + name, mask=rest, other=0), mask=rest)
            tl.store(shared + name, tl.zeros_like(name).to(tl.uint8), mask=rest)
        for e in range(0, E, BLOCK_E):
            column = e + tl.arange(0, BLOCK_E)
            hits = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
            for k in tl.static_range(K):
                expert = _expert(ids, rank, is_copy, token, inside, ep_rank, k, K, LOCAL, PAIRS)
                hits += (expert[:, None] == column[None, :]).to(tl.int32)
            tl.store(counts + program * E + column, tl.sum(hits, axis=0), mask=column < E)
        for first in range(0, each, 512):  # this program's share of the table, empty until _place fills it
            near = first + tl.arange(0, 512)
            at = program * each + near
            tl.store(table + at, tl.zeros_like(at) - 1, mask=(near < each) & (at < num_places))

    @triton.jit(do_not_specialize=["num_tokens", "num_chunks", "ep_rank"])
    def _place(
        ids, rank, is_copy, order, counts, table, num_tokens, num_chunks, E, ep_rank,
        K: tl.constexpr, W: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_C: tl.constexpr,
        BY_SEQUENCE: tl.constexpr, LOCAL: tl.constexpr, PAIRS: tl.constexpr,
    ):  # fmt: skip
        segment, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
        token, inside = _tokens(order, num_tokens, segment, chunk, BLOCK_T, BY_SEQUENCE)
        # First window of the experts that follow: parts of sequences begin where no earlier one can reach.
        first = segment * E
        if BY_SEQUENCE:
            first += tl.load(order + segment) * K // W
        for e in range(0, E, BLOCK_E):
            column = e + tl.arange(0, BLOCK_E)
            total = tl.zeros((BLOCK_E,), dtype=tl.int32)
            before = tl.zeros((BLOCK_E,), dtype=tl.int32)
            for c in range(0, num_chunks, BLOCK_C):
                other = c + tl.arange(0, BLOCK_C)
                at = (segment * num_chunks + other)[:, None] * E + column[None, :]
                n = tl.load(counts + at, mask=(other < num_chunks)[:, None] & (column < E)[None, :], other=0)
                total += tl.sum(n, axis=0)
                before += tl.sum(tl.where((other < chunk)[:, None], n, 0), axis=0)
            needed = (total + W - 1) // W
            start = (first + tl.cumsum(needed, axis=0) - needed) * W + before
            first += tl.sum(needed, axis=0)
            hits = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
            choice = tl.zeros((BLOCK_T, BLOCK_E), dtype=tl.int32)
            for k in tl.static_range(K):
                expert = _expert(ids, rank, is_copy, token, inside, ep_rank, k, K, LOCAL, PAIRS)
                hit = (expert[:, None] == column[None, :]).to(tl.int32)
                hits += hit
                choice += hit * k
            at = start[None, :] + tl.cumsum(hits, axis=0) - hits
            tl.store(table + at, token[:, None] * K + choice, mask=hits > 0)
