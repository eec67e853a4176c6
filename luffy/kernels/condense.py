"""The decision what to condense in three launches: groups, windows, cosines, choice, and what becomes of every copy.

Written with torch operations (luffy.exchange.condense, luffy.kernels.representatives) the decision is about a hundred
launches, each a few microseconds of a GPU and more of its host, whatever the number of copies. Here:

    _count    copies of each expert in each block of tokens; answers for copies that cannot be condensed
    _place    the windows' table: every copy to its place, by a stable counting sort over blocks of tokens
    _choose   a program a window: W x W cosines on the matrix units, representatives, audit, answers

There is no sort: copies of one expert are to stand in the order of time, in which the tokens can be visited from the
start, so counting suffices. Where windows keep within a sequence, each sequence has a part of the table to itself. The
cosines never leave the chip, so memory is linear in copies; nothing is read back by the host.

Rows are not scaled beforehand: the products of the rows as they are, divided by the lengths that stand on the diagonal.
Products of bfloat16 are exact in float32 and are summed in it, so cosines are those of the float32 path up to the order
of summation, about 1e-6, and twins are alike at any threshold up to there.
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

BLOCK_TOKENS = 128  # tokens that one program of _count and _place looks at
_LAST_KEY = 2**63 - 1


def available(x: Tensor, window: int) -> bool:
    """Whether the kernels decide for rows such as x [T, D]."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64 and window in (16, 32, 64, 128)


@dataclass(frozen=True)
class Question:
    """What one layer asks. x [T, D]: rows of any length. ids, rank int64 [T, K], is_copy bool [T, K]: as CopyKeys.

    local, by_sequence, pairs: which copies may be condensed, and among whom (luffy.exchange.condense.find_groups).
    audit: None, or (share, step, layer).
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
    audit: tuple[float, int, int] | None = None


@dataclass(frozen=True)
class Answer:
    """[T, K] each; see luffy.exchange.condense.Condensed."""

    leader: Tensor
    sent: Tensor
    shared: Tensor
    audited: Tensor


def decide(q: Question) -> Answer:
    """Decide for all copies of a layer."""
    table, answer = find_windows(q)
    choose(q, table, answer)
    return answer


def find_windows(q: Question) -> tuple[Tensor, Answer]:
    """Copies of each window, int32 [windows, W], -1 where empty; answers, those of copies in no window filled in."""
    (T, K), E, W, layout, device = q.ids.shape, q.num_experts, q.window, q.layout, q.x.device
    segments, longest = (layout.num_sequences, layout.max_length) if q.by_sequence else (1, T)
    num_windows = T * K // W + segments * E  # an upper bound that needs no read-back
    if num_windows * W >= 2**31:
        raise ValueError(f"{T * K} copies in windows of {W}, {segments * E} groups: more than int32 can count")
    table = torch.empty(num_windows, W, dtype=torch.int32, device=device)
    leader, audited = (torch.empty(T, K, dtype=torch.int64, device=device) for _ in range(2))
    sent, shared = (torch.empty(T, K, dtype=torch.bool, device=device) for _ in range(2))
    answer = Answer(leader, sent, shared, audited)
    chunks = -(-longest // BLOCK_TOKENS)
    programs = segments * chunks
    if programs == 0:
        return table.fill_(-1), answer
    counts = torch.empty(programs, E, dtype=torch.int32, device=device)
    ids, rank, is_copy = (t.contiguous() for t in (q.ids, q.rank, q.is_copy.view(torch.uint8)))
    # With all in one segment `starts` is not read, in sequences `in_time` is not: each then stands for the other.
    order = layout.cu_seqlens if q.by_sequence else layout.tokens_in_time
    shape = {
        "K": K, "BLOCK_T": BLOCK_TOKENS, "BLOCK_E": min(32, triton.next_power_of_2(E)), "BY_SEQUENCE": q.by_sequence,
        "LOCAL": q.local, "PAIRS": q.pairs, "num_warps": 4,
    }  # fmt: skip
    each = -(-table.numel() // programs)
    count: Any = _count[(programs,)]
    count(
        ids, rank, is_copy, order, counts, table, leader, sent.view(torch.uint8), shared.view(torch.uint8), audited,
        T, chunks, table.numel(), each, E, q.ep_rank, **shape,
    )  # fmt: skip
    place: Any = _place[(programs,)]
    place(ids, rank, is_copy, order, counts, table, T, chunks, E, q.ep_rank, W=W, BLOCK_C=64, **shape)
    return table, answer


def choose(q: Question, table: Tensor, answer: Answer, *, block: int = 64, num_warps: int = 0, stages: int = 3) -> None:
    """Fill in the answers of all copies in windows. block: columns of x at once."""
    x = q.x if q.x.stride(-1) == 1 else q.x.contiguous()
    if not len(table):
        return
    share, step, layer = q.audit or (0.0, 0, 0)
    W = q.window
    launch: Any = _choose[(len(table),)]
    launch(
        x, table, q.layout.global_token if q.audit else table, answer.leader, answer.sent.view(torch.uint8),
        answer.shared.view(torch.uint8), answer.audited, x.shape[1], x.stride(0), q.threshold, share, step, layer,
        K=q.ids.shape[1], W=W, BLOCK=block, CAUSAL=q.causal, NEAREST=q.nearest, AUDIT=q.audit is not None,
        num_warps=num_warps or (8 if W > 64 else 4), num_stages=stages,
    )  # fmt: skip


def drop(keys: Tensor, rank: Tensor, is_copy: Tensor, sent: Tensor) -> tuple[Tensor, Tensor]:
    """Keys int64 [T * K] and ranks [T, K] without the copies that do not travel; one launch."""
    keys, rank, is_copy, sent = (t.contiguous() for t in (keys, rank, is_copy, sent))
    new_keys, new_rank = torch.empty_like(keys), torch.empty_like(rank)
    if keys.numel():
        launch: Any = _drop[(triton.cdiv(keys.numel(), 1024),)]
        launch(
            keys, rank, is_copy.view(torch.uint8), sent.view(torch.uint8), new_keys, new_rank, keys.numel(),
            LAST=_LAST_KEY, BLOCK=1024,
        )  # fmt: skip
    return new_keys, new_rank


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
        ids, rank, is_copy, order, counts, table, leader, sent, shared, audited,
        num_tokens, num_chunks, num_places, each, E, ep_rank,
        K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BY_SEQUENCE: tl.constexpr, LOCAL: tl.constexpr,
        PAIRS: tl.constexpr,
    ):  # fmt: skip
        program = tl.program_id(0)
        token, inside = _tokens(
            order, num_tokens, program // num_chunks, program % num_chunks, BLOCK_T, BY_SEQUENCE
        )
        for k in tl.static_range(K):
            expert = _expert(ids, rank, is_copy, token, inside, ep_rank, k, K, LOCAL, PAIRS)
            name, rest = token * K + k, inside & (expert < 0)
            tl.store(leader + name, name.to(tl.int64), mask=rest)
            tl.store(sent + name, tl.load(is_copy + name, mask=rest, other=0), mask=rest)
            tl.store(shared + name, tl.zeros_like(name).to(tl.uint8), mask=rest)
            tl.store(audited + name, tl.zeros_like(name).to(tl.int64) - 1, mask=rest)
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

    @triton.jit
    def _representatives(
        similarity, threshold, real, place, W: tl.constexpr, CAUSAL: tl.constexpr, NEAREST: tl.constexpr
    ):
        """(whether each row is represented by another, by the row in which place): `settle` for one window."""
        edges = (similarity >= threshold) & real[:, None] & real[None, :]
        if CAUSAL:
            edges = edges & (place[:, None] < place[None, :])
            key = W - place
        else:
            edges = edges & (place[:, None] != place[None, :])
            key = tl.sum(edges.to(tl.int32), axis=1) * W + (W - 1 - place)
        stops = (edges & (key[:, None] > key[None, :])).to(tl.int32)
        state = tl.where(real, 0, 2)  # 0 open, 1 represents, 2 represented or empty
        num_open = tl.sum(real.to(tl.int32), axis=0)
        while num_open > 0:
            covered = tl.max(stops * (state == 1).to(tl.int32)[:, None], axis=0)
            waiting = tl.max(stops * (state == 0).to(tl.int32)[:, None], axis=0)
            settled = tl.where(covered > 0, 2, tl.where(waiting > 0, 0, 1))
            state = tl.where(state == 0, settled, state)
            num_open = tl.sum((state == 0).to(tl.int32), axis=0)
        score = similarity
        if not NEAREST:
            score = key[:, None].to(tl.float32) + tl.zeros((W, W), dtype=tl.float32)
        score = tl.where(edges & (state == 1)[:, None], score, float("-inf"))
        condensed = real & (state == 2)
        return condensed, tl.where(condensed, tl.argmax(score, axis=0), place)

    @triton.jit
    def _mix(name, step, layer):
        """luffy.exchange.condense._mix, bit for bit."""
        salt = step.to(tl.int64) * 0x3F58476D1CE4E5B9 + layer.to(tl.int64) * 0x14D049BB133111EB
        z = name * 0x1E3779B97F4A7C15 + (salt & 0x7FFFFFFFFFFFFFFF)
        z = (z ^ (z >> 30)) * 0x3F58476D1CE4E5B9
        z = (z ^ (z >> 27)) * 0x14D049BB133111EB
        return ((z ^ (z >> 31)) & 0xFFFFFF).to(tl.float32) / 16777216.0

    @triton.jit(do_not_specialize=["step", "layer"])
    def _choose(
        x, table, global_token, leader, sent, shared, audited, D, stride, threshold, share, step, layer,
        K: tl.constexpr, W: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, NEAREST: tl.constexpr,
        AUDIT: tl.constexpr,
    ):  # fmt: skip
        place = tl.arange(0, W)
        row = tl.load(table + tl.program_id(0) * W + place)
        real = row >= 0
        num_real = tl.sum(real.to(tl.int32), axis=0)
        if num_real > 0:
            token = tl.where(real, row, 0) // K
            start = token.to(tl.int64) * stride
            similarity = tl.zeros((W, W), dtype=tl.float32)
            depth = tl.where(num_real > 1, D, 0)  # who is alone in its window is like nobody
            for first in range(0, depth, BLOCK):
                column = first + tl.arange(0, BLOCK)
                mask = real[:, None] & (column < D)[None, :]
                tile = tl.load(x + start[:, None] + column[None, :], mask=mask, other=0.0)
                similarity = tl.dot(tile, tl.trans(tile), similarity, input_precision="tf32x3")
            square = tl.sum(tl.where(place[:, None] == place[None, :], similarity, 0.0), axis=1)
            scale = tl.div_rn(tl.full((W,), 1.0, tl.float32), tl.maximum(tl.sqrt_rn(square), 1e-12))
            similarity = similarity * (scale[:, None] * scale[None, :])
            condensed, best = _representatives(similarity, threshold, real, place, W, CAUSAL, NEAREST)
            stands = tl.max(((best[None, :] == place[:, None]) & condensed[None, :]).to(tl.int32), axis=1) > 0
            other = tl.load(table + tl.program_id(0) * W + best)
            picked = condensed & (place < 0)
            if AUDIT:
                name = tl.load(global_token + token, mask=real, other=0) * K + tl.where(real, row, 0) % K
                picked = condensed & (_mix(name, step, layer) < share)
            tl.store(leader + row, tl.where(picked, row, other).to(tl.int64), mask=real)
            tl.store(sent + row, (picked | ~condensed).to(tl.uint8), mask=real)
            tl.store(shared + row, (picked | stands).to(tl.uint8), mask=real)
            tl.store(audited + row, tl.where(picked, other, -1).to(tl.int64), mask=real)

    @triton.jit(do_not_specialize=["num_copies"])
    def _drop(
        keys, rank, is_copy, sent, new_keys, new_rank, num_copies, LAST: tl.constexpr, BLOCK: tl.constexpr
    ):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        mask = at < num_copies
        gone = (tl.load(is_copy + at, mask=mask, other=0) != 0) & (tl.load(sent + at, mask=mask, other=0) == 0)
        tl.store(new_keys + at, tl.where(gone, LAST, tl.load(keys + at, mask=mask, other=0)), mask=mask)
        tl.store(new_rank + at, tl.where(gone, -1, tl.load(rank + at, mask=mask, other=0)), mask=mask)
