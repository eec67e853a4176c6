"""The paper's whole similarity graph in a few launches: every pair of a group is looked at, and none is padding.

arXiv 2411.15419 compares every two tokens that one rank sends to one expert, keeps for the next block which pairs were
alike (above S1) or not (below S2), and takes the token of highest degree first. With torch operations
(luffy.exchange.condense) groups of all sizes are padded to the largest, and a table of all pairs of tokens carries what
was found to the next block: some forty passes over tens of millions of pairs. Here:

    _name     the group of each copy, in the order of time; a stable sort then puts groups together
    _place    where each copy stands in its group
    _pairs    a program a tile of a group's pairs: cosines on the matrix units, the previous block's word on them, and
              one byte a pair: what the next block will want to know, and whether there is an edge
    _settle   a program a group: who represents, and what becomes of every copy

The n copies of a group have n^2 bytes, so memory is the sum of n^2 over groups: at most a byte for each copy and each
token that it can meet. The next block finds a pair by the places that its two tokens had in a group that they shared;
nothing is kept for pairs that never met.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luffy.kernels.windows import BLOCK_TOKENS, Answer, Question
from luffy.plan.condensation import ALIKE, UNLIKE

try:
    import triton
    import triton.language as tl

    from luffy.kernels.windows import _expert, _tokens
except ImportError:  # no Triton for this platform: the torch path serves
    triton = None

TILE = 64  # copies along either side of what one program looks at


def available(x: Tensor) -> bool:
    """Whether the kernels decide for rows such as x [T, D]."""
    return triton is not None and x.is_cuda and x.dtype != torch.float64


def num_pairs(q: Question) -> int:
    """Bytes that the pairs of a layer take at most."""
    longest = q.layout.max_length if q.by_sequence else q.ids.shape[0]
    return q.ids.numel() * (min(q.window, longest) if q.window else longest)


@dataclass(frozen=True)
class Graph:
    """What one block found of the pairs of its groups.

    row: int32 [tokens of all ranks], of each token among those that were here, -1 for the others. group, place: int32
    [T * K], each copy's group, -1 for none, and its place there. first: int32 [T * K], where its pairs begin.
    pairs: uint8, of copies i and j of a group at first[i] + place[j]: 1 unlike, 2 between, 3 alike; plus 4 for an edge.
    """

    row: Tensor
    group: Tensor
    place: Tensor
    first: Tensor
    pairs: Tensor


def decide(q: Question, before: Graph | None) -> tuple[Answer, Graph]:
    """What becomes of every copy, and what was found; before: of the previous block.

    Priority is time where causal, else the degree; a copy goes to the representative that covered it first. q.window:
    groups are cut into so many copies, 0: not at all. q.nearest is not looked at.
    """
    (T, K), layout, device = q.ids.shape, q.layout, q.x.device
    order, begin, first_pair, found = _in_groups(q)
    n = len(begin) - 1
    answer = Answer(torch.arange(T * K, device=device).view(T, K), q.is_copy.clone(), torch.zeros_like(q.is_copy))
    if not T or not n:
        return answer, found
    x = q.x if q.x.stride(-1) == 1 else q.x.contiguous()
    length = torch.linalg.vector_norm(x, dim=1, dtype=torch.float32)
    past = found if before is None else before
    tiles = -(-(len(found.pairs) // (T * K)) // TILE)
    block = 64 if x.element_size() == 2 else 16  # float32 is multiplied without matrix units, in code laid out whole
    launch: Any = _pairs[(n, tiles, tiles)]
    launch(
        x, length, order, begin, first_pair, found.pairs,
        layout.global_token, past.row, past.group, past.place, past.first, past.pairs,
        x.shape[1], x.stride(0), float(q.threshold), ALIKE, UNLIKE,
        K=K, B=TILE, BLOCK=block, CAUSAL=q.causal, BEFORE=before is not None, num_warps=4,
    )  # fmt: skip
    key, state = (torch.empty(T * K, dtype=torch.int32, device=device) for _ in range(2))
    launch = _settle[(n,)]
    launch(
        order, begin, first_pair, found.pairs, key, state, answer.leader, answer.sent.view(torch.uint8),
        answer.shared.view(torch.uint8), B=TILE, CAUSAL=q.causal, num_warps=4,
    )  # fmt: skip
    return answer, found


def _in_groups(q: Question) -> tuple[Tensor, Tensor, Tensor, Graph]:
    """(copies by group and then time, int32 [T * K]; where each group begins there, int32 [n + 1]; where its pairs do,
    int64 [n]; the graph, its pairs still to be found)."""
    (T, K), E, layout, device = q.ids.shape, q.num_experts, q.layout, q.x.device
    segments, longest = (layout.num_sequences, layout.max_length) if q.by_sequence else (1, T)
    n = segments * E
    # A sort takes a pass for each byte.
    narrow = torch.uint8 if n < 256 else torch.int16 if n < 1 << 15 else torch.int32
    name = torch.empty(T * K, dtype=narrow, device=device)
    order, group, place, first = torch.empty(4, T * K, dtype=torch.int32, device=device)
    row = torch.full((layout.table.num_tokens,), -1, dtype=torch.int32, device=device)
    in_time = layout.cu_seqlens if q.by_sequence else layout.tokens_in_time
    if T:
        chunks = -(-longest // BLOCK_TOKENS)
        launch: Any = _name[(segments * chunks,)]
        launch(
            *(t.contiguous() for t in (q.ids, q.rank, q.is_copy.view(torch.uint8))), in_time, layout.global_token,
            name, row, T, chunks, E, n, q.ep_rank, K=K, BLOCK_T=BLOCK_TOKENS, BY_SEQUENCE=q.by_sequence, LOCAL=q.local,
            PAIRS=q.pairs, num_warps=4,
        )  # fmt: skip
    ordered, index = name.sort(stable=True)
    if q.window:
        ordered, n = _cut(ordered, n, q.window)
    bounds = torch.arange(n + 1, dtype=ordered.dtype, device=device)
    begin = torch.searchsorted(ordered, bounds, out_int32=True)
    area = begin.diff().to(torch.int64).square()
    first_pair = area.cumsum(0) - area
    if T:
        launch = _place[(-(-T * K // 256),)]
        launch(
            ordered, index, in_time, begin, first_pair, order, group, place, first, T * K, n,
            K=K, BLOCK=256, BY_SEQUENCE=q.by_sequence, num_warps=4,
        )  # fmt: skip
    pairs = torch.empty(num_pairs(q), dtype=torch.uint8, device=device)
    return order, begin, first_pair, Graph(row, group, place, first, pairs)


def _cut(ordered: Tensor, num_groups: int, window: int) -> tuple[Tensor, int]:
    """Names of parts of at most `window` copies in place of sorted names of groups; how many there may be."""
    place = torch.arange(len(ordered), device=ordered.device)
    ordered = ordered.to(torch.int64)
    begin = torch.searchsorted(ordered, torch.arange(num_groups + 2, device=ordered.device))
    needed = (begin.diff() + window - 1) // window
    part = (needed.cumsum(0) - needed)[ordered] + (place - begin[ordered]) // window
    n = len(ordered) // window + num_groups  # an upper bound that needs no read-back
    return torch.where(ordered < num_groups, part, n).to(torch.int32), n


if triton is not None:

    @triton.jit(do_not_specialize=["num_tokens", "num_chunks", "num_groups", "ep_rank"])
    def _name(
        ids, rank, is_copy, in_time, global_token, name, row, num_tokens, num_chunks, E, num_groups, ep_rank,
        K: tl.constexpr, BLOCK_T: tl.constexpr, BY_SEQUENCE: tl.constexpr, LOCAL: tl.constexpr, PAIRS: tl.constexpr,
    ):  # fmt: skip
        segment, chunk = tl.program_id(0) // num_chunks, tl.program_id(0) % num_chunks
        token, inside = _tokens(in_time, num_tokens, segment, chunk, BLOCK_T, BY_SEQUENCE)
        at = token if BY_SEQUENCE else chunk * BLOCK_T + tl.arange(0, BLOCK_T)
        for k in tl.static_range(K):
            expert = _expert(ids, rank, is_copy, token, inside, ep_rank, k, K, LOCAL, PAIRS)
            group = tl.where(expert < 0, num_groups, expert + E * segment)
            tl.store(name + at * K + k, group.to(name.dtype.element_ty), mask=inside)
        tl.store(row + tl.load(global_token + token, mask=inside, other=0), token, mask=inside)

    @triton.jit(do_not_specialize=["num_copies", "num_groups"])
    def _place(
        ordered, index, in_time, begin, first_pair, order, group, place, first, num_copies, num_groups,
        K: tl.constexpr, BLOCK: tl.constexpr, BY_SEQUENCE: tl.constexpr,
    ):  # fmt: skip
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        inside = at < num_copies
        copy = tl.load(index + at, mask=inside, other=0).to(tl.int32)
        if not BY_SEQUENCE:
            copy = tl.load(in_time + copy // K, mask=inside, other=0) * K + copy % K
        of = tl.load(ordered + at, mask=inside, other=0).to(tl.int32)
        real = inside & (of < num_groups)
        start = tl.load(begin + of, mask=real, other=0)
        size = tl.load(begin + of + 1, mask=real, other=0) - start
        pairs = tl.load(first_pair + of, mask=real, other=0).to(tl.int32)
        tl.store(order + at, copy, mask=inside)
        tl.store(group + copy, tl.where(real, of, -1), mask=inside)
        tl.store(place + copy, at - start, mask=inside)
        tl.store(first + copy, pairs + (at - start) * size, mask=inside)

    @triton.jit
    def _pairs(
        x, length, order, begin, first_pair, pairs,
        global_token, past_row, past_group, past_place, past_first, past_pairs,
        D, stride, threshold, above, below,
        K: tl.constexpr, B: tl.constexpr, BLOCK: tl.constexpr, CAUSAL: tl.constexpr, BEFORE: tl.constexpr,
    ):  # fmt: skip
        start = tl.load(begin + tl.program_id(0))
        n = tl.load(begin + tl.program_id(0) + 1) - start
        i_first, j_first = tl.program_id(1) * B, tl.program_id(2) * B
        if (i_first <= j_first) & (j_first < n):  # the other half is this one's mirror image
            i, j = i_first + tl.arange(0, B), j_first + tl.arange(0, B)
            in_i, in_j = i < n, j < n
            token_i = tl.load(order + start + i, mask=in_i, other=0) // K
            token_j = tl.load(order + start + j, mask=in_j, other=0) // K
            row_i, row_j = token_i.to(tl.int64) * stride, token_j.to(tl.int64) * stride
            similarity = tl.zeros((B, B), dtype=tl.float32)
            for d in range(0, D, BLOCK):
                column = d + tl.arange(0, BLOCK)
                inside = (column < D)[None, :]
                left = tl.load(x + row_i[:, None] + column[None, :], mask=in_i[:, None] & inside, other=0.0)
                right = tl.load(x + row_j[:, None] + column[None, :], mask=in_j[:, None] & inside, other=0.0)
                similarity = tl.dot(left, tl.trans(right), similarity, input_precision="ieee")
            ones = tl.full((B,), 1.0, tl.float32)
            scale_i = tl.div_rn(ones, tl.maximum(tl.load(length + token_i, mask=in_i, other=1.0), 1e-12))
            scale_j = tl.div_rn(ones, tl.maximum(tl.load(length + token_j, mask=in_j, other=1.0), 1e-12))
            similarity = similarity * (scale_i[:, None] * scale_j[None, :])
            if BEFORE:
                then_i = tl.load(past_row + tl.load(global_token + token_i, mask=in_i, other=0), mask=in_i, other=-1)
                then_j = tl.load(past_row + tl.load(global_token + token_j, mask=in_j, other=0), mask=in_j, other=-1)
                code = tl.zeros((B, B), dtype=tl.int32)
                for a in tl.static_range(K):
                    group_i = tl.load(past_group + then_i * K + a, mask=then_i >= 0, other=-1)
                    first = tl.load(past_first + then_i * K + a, mask=then_i >= 0, other=0)
                    for b in tl.static_range(K):
                        group_j = tl.load(past_group + then_j * K + b, mask=then_j >= 0, other=-1)
                        place = tl.load(past_place + then_j * K + b, mask=then_j >= 0, other=0)
                        met = (group_i >= 0)[:, None] & (group_i[:, None] == group_j[None, :])
                        byte = tl.load(past_pairs + first[:, None] + place[None, :], mask=met, other=0)
                        code = tl.maximum(code, (byte & 3).to(tl.int32))
                similarity = tl.where(code == 3, 1.0, tl.where(code == 1, 0.0, similarity))
            edge = similarity >= threshold
            code = 2 + (similarity > above).to(tl.int32) - (similarity < below).to(tl.int32)
            real = in_i[:, None] & in_j[None, :]
            here = pairs + tl.load(first_pair + tl.program_id(0))
            if CAUSAL:
                edge = edge & (i[:, None] < j[None, :])
            else:
                edge = edge & (i[:, None] != j[None, :])
            byte = code + 4 * edge.to(tl.int32)
            tl.store(here + i[:, None] * n + j[None, :], byte.to(tl.uint8), mask=real)
            if i_first != j_first:
                if CAUSAL:
                    byte = code
                tl.store(here + j[None, :] * n + i[:, None], byte.to(tl.uint8), mask=real)

    @triton.jit
    def _edges(pairs, i, j, n):
        """Whether copy i may stand for copy j: a tile."""
        real = (i < n)[:, None] & (j < n)[None, :]
        return tl.load(pairs + i[:, None] * n + j[None, :], mask=real, other=0) >= 4

    @triton.jit
    def _settled(was, highest):
        """An open copy's next state by the highest of those that could stand for it and go first: represented if one of
        them represents, representing once none of them is open. 1: open, 2: represents, 0: represented."""
        return tl.where(was == 1, tl.where(highest == 2, 0, tl.where(highest == 1, 1, 2)), was)

    @triton.jit
    def _settle(
        order, begin, first_pair, pairs, key, state, leader, sent, shared, B: tl.constexpr, CAUSAL: tl.constexpr
    ):
        group = tl.program_id(0)
        start = tl.load(begin + group)
        n = tl.load(begin + group + 1) - start
        pairs += tl.load(first_pair + group)
        key += start
        state += start
        order += start
        if CAUSAL:  # a higher key is an earlier place, so once through the tiles settles all
            for j_first in range(0, n, B):
                j = j_first + tl.arange(0, B)
                highest = tl.zeros((B,), dtype=tl.int32)
                for i_first in range(0, j_first, B):
                    i = i_first + tl.arange(0, B)
                    theirs = tl.load(state + i)
                    highest = tl.maximum(highest, tl.max(tl.where(_edges(pairs, i, j, n), theirs[:, None], 0), axis=0))
                now = tl.where(j < n, tl.where(highest == 2, 0, 1), 0)
                edge = _edges(pairs, j, j, n)
                num_open = tl.sum(now, axis=0)
                while num_open > 0:
                    now = _settled(now, tl.max(tl.where(edge, now[:, None], 0), axis=0))
                    num_open = tl.sum((now == 1).to(tl.int32), axis=0)
                tl.store(state + j, now, mask=j < n)
                tl.store(key + j, n - j, mask=j < n)
                tl.debug_barrier()
        else:
            for j_first in range(0, n, B):
                j = j_first + tl.arange(0, B)
                degree = tl.zeros((B,), dtype=tl.int32)
                for i_first in range(0, n, B):
                    i = i_first + tl.arange(0, B)
                    degree += tl.sum(_edges(pairs, i, j, n).to(tl.int32), axis=0)
                tl.store(key + j, degree * n + (n - 1 - j), mask=j < n)
                tl.store(state + j, tl.full((B,), 1, tl.int32), mask=j < n)
            tl.debug_barrier()
            num_open = n
            while num_open > 0:
                num_open = 0
                for j_first in range(0, n, B):
                    j = j_first + tl.arange(0, B)
                    was = tl.load(state + j, mask=j < n, other=0)
                    if tl.sum((was == 1).to(tl.int32), axis=0) > 0:
                        mine = tl.load(key + j, mask=j < n, other=0)
                        highest = tl.zeros((B,), dtype=tl.int32)
                        for i_first in range(0, n, B):
                            i = i_first + tl.arange(0, B)
                            theirs = tl.load(key + i, mask=i < n, other=0)
                            # States only ever become final, so it does no harm to see some of them early.
                            their_state = tl.load(state + i, mask=i < n, other=0)
                            stops = _edges(pairs, i, j, n) & (theirs[:, None] > mine[None, :])
                            highest = tl.maximum(highest, tl.max(tl.where(stops, their_state[:, None], 0), axis=0))
                        now = _settled(was, highest)
                        tl.store(state + j, now, mask=j < n)
                        num_open += tl.sum((now == 1).to(tl.int32), axis=0)
                    tl.debug_barrier()
        for j_first in range(0, n, B):  # the representative of the highest key covered a copy first
            j = j_first + tl.arange(0, B)
            best = tl.full((B,), -1, tl.int32)
            for i_first in range(0, (j_first + B) if CAUSAL else n, B):
                i = i_first + tl.arange(0, B)
                theirs = tl.load(key + i, mask=i < n, other=-1)
                represents = tl.load(state + i, mask=i < n, other=0) == 2
                able = _edges(pairs, i, j, n) & represents[:, None]
                best = tl.maximum(best, tl.max(tl.where(able, theirs[:, None], -1), axis=0))
            taken = (tl.load(state + j, mask=j < n, other=2) == 0) & (best >= 0)
            if CAUSAL:
                place = n - best
            else:
                place = n - 1 - best % n
            who = tl.load(order + place, mask=taken, other=0)
            name = tl.load(order + j, mask=j < n, other=0)
            tl.store(leader + name, who.to(tl.int64), mask=taken)
            tl.store(sent + name, tl.zeros_like(name).to(tl.uint8), mask=taken)
            tl.store(shared + who, (tl.zeros_like(who) + 1).to(tl.uint8), mask=taken)
