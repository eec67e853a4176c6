"""Condense: which copies travel, and which take the answer of one that does.

Among the copies that one rank sends to one expert, similar ones are represented by one (arXiv 2411.15419, section V).
A *copy* is what can be saved, not a choice: a copy that serves two experts of its rank would have to find both of its
answers elsewhere, apart from each other, so only copies that serve one expert take part. What travels for others is
sent with weight one: its answer E(norm(h)) comes back unweighted, once, and every token it stands for takes it times
a weight of its own. Backward is the derivative of just that, so a representative receives the sum of what its tokens
would have.

Decided from what the sender knows, before anything is sent:

    group      copies by expert; also by sequence where sequences move, so that whom a copy represents lives with it
    window     copies of a group in the order of position, W at a time (luffy.kernels.representatives)

Written twice: below with torch operations, which is what is meant, and fused, which is what GPUs run
(luffy.kernels.condense; luffy.kernels.graph for the paper's whole graph). Both give the same answer, and the tests hold
one to the other.

Condensation is for training only: evaluation never condenses.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from luffy.condensation import Condensation
from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.exchange.copies import CopyKeys, ExpertMap
from luffy.exchange.hashing import same_bucket
from luffy.kernels import condense as fused
from luffy.kernels import graph
from luffy.kernels.representatives import choose_representatives, settle
from luffy.plan.condensation import ALIKE, UNLIKE

NUM_COUNTS = 2  # of `Condensed.counts`
LARGEST_GRAPH = 1 << 28  # pairs of tokens of one layer on one rank
LARGEST_FUSED_GRAPH = (1 << 31) - 1  # pairs of copies that may meet, a byte each
_GRAPH_CHUNK = 1 << 24  # pairs looked at at once


@dataclass
class CondenseState:
    """The scheme, and what changes from step to step; shared by all layers, equal on all ranks.

    thresholds: of each MoE layer. on: False in warm-up and after the condensed part of a run.
    """

    scheme: Condensation
    thresholds: list[float] = field(default_factory=list)
    on: bool = True


@dataclass(frozen=True)
class Condensed:
    """What became of the T * K possible copies of this rank under a scheme; [T, K] each, copies named t * K + k.

    leader: the copy whose answer serves this one, itself where it is sent. copy: real ones. sent: those that travel.
    shared: those sent with weight one.
    """

    scheme: Condensation
    leader: Tensor
    copy: Tensor
    sent: Tensor
    shared: Tensor

    def counts(self) -> Tensor:
        """int64 [NUM_COUNTS]: copies of this rank's tokens, and those of them that travel."""
        return torch.stack([self.copy.sum(), self.sent.sum()])

    @property
    def takes_shared(self) -> Tensor:
        """Whether a copy's answer comes unweighted, from itself or from another: bool [T, K]."""
        return self.copy & self.shared.flatten()[self.leader]


@dataclass(frozen=True)
class SimilarityHistory:
    """What one block found of pairs of tokens, for the paper's filter: uint8 [T, T], rows and columns in the order of
    `global_token`; 0 unknown, 1 below S2, 2 between, 3 above S1. The fused path has luffy.kernels.graph.Graph."""

    global_token: Tensor
    code: Tensor

    def codes_for(self, global_token: Tensor) -> Tensor:
        """[T', T'] for the tokens that are here now; 0 for those that were elsewhere."""
        ordered, index = self.global_token.sort()
        at = torch.searchsorted(ordered, global_token).clamp_max(max(0, len(ordered) - 1))
        known = ordered[at] == global_token
        row = index[at]
        return self.code[row][:, row] * (known[:, None] & known[None, :])


History = SimilarityHistory | graph.Graph


def find_groups(
    ids: Tensor, keys: CopyKeys, layout: Layout, num_experts: int, ep_rank: int, *, local: bool, by_sequence: bool,
    pairs: bool,
) -> tuple[Tensor, int]:  # fmt: skip
    """(group of each possible copy, int64 [T, K]; number of groups). Copies that cannot be condensed have group G."""
    single = keys.is_copy.clone()
    if not pairs:  # exactly one expert at its rank
        same = (keys.rank[:, :, None] == keys.rank[:, None, :]).sum(2)
        single &= same == 1
    if not local:
        single &= keys.rank != ep_rank
    group, G = ids, num_experts
    if by_sequence:
        group, G = ids + num_experts * layout.sequence_of_token[:, None], num_experts * layout.num_sequences
    return torch.where(single, group, G), G


def make_windows(group: Tensor, num_groups: int, layout: Layout, window: int) -> Tensor:
    """Copies of each window in the order of position, then of sequence: int64 [windows, W], -1 where empty.

    A window begins where its group does, and is filled in that order: which window a copy is in depends on nothing
    that stands behind it.
    """
    T, K = group.shape
    order = (group * layout.num_moments + layout.moment[:, None]).flatten().argsort(stable=True)
    ordered = group.flatten()[order]
    counts = torch.zeros(num_groups + 1, dtype=torch.int64, device=group.device)
    counts.index_add_(0, ordered, torch.ones_like(ordered))
    longest = window
    if not (window and group.is_cuda):  # on a GPU it would be a read-back
        longest = max(1, int(counts[:num_groups].max()) if num_groups else 1)
    W = window or longest
    start = counts.cumsum(0) - counts
    place = torch.arange(T * K, device=group.device) - start[ordered]
    needed = (counts + W - 1) // W
    needed[num_groups] = 0
    first = needed.cumsum(0) - needed
    # On a GPU an upper bound; elsewhere what there is, and below no wider than the largest group.
    num_windows = T * K // W + num_groups if group.is_cuda else int(needed.sum())
    at = torch.where(ordered < num_groups, (first[ordered] + place // W) * W + place % W, num_windows * W)
    rows = torch.full((num_windows * W + 1,), -1, dtype=torch.int64, device=group.device)
    rows[at] = order
    return rows[:-1].unflatten(0, (num_windows, W))[:, :longest]


def leaders(rows: Tensor, leader_place: Tensor, num_copies: int) -> Tensor:
    """Places in windows [windows, W] -> the copy that represents each of num_copies, int64."""
    leader = torch.arange(num_copies + 1, device=rows.device)
    leader[torch.where(rows >= 0, rows, num_copies)] = rows.gather(1, leader_place)
    return leader[:-1]


def condense(
    state: CondenseState,
    layer: int,
    x: Tensor,
    ids: Tensor,
    keys: CopyKeys,
    layout: Layout,
    experts: ExpertMap,
    ep_rank: int,
    *,
    causal: bool,
    by_sequence: bool,
    pairs: bool,
    history: History | None = None,
    kernel: bool | None = None,
) -> tuple[Condensed, History | None]:
    """Decide for one layer. x [T, D]: the experts' inputs. Without gradient: the choice is discrete.

    kernel: force the fused kernels or torch; None: the kernels on a GPU.
    """
    scheme, (T, K) = state.scheme, ids.shape
    with torch.no_grad():
        E = experts.slot_of_expert.shape[0]
        # Where sequences move, who is local follows from a plan that knows the whole batch: to spare local copies
        # would tell a token of its future, and let results depend on where it lives.
        local = scheme.local or by_sequence
        if kernel is None:
            kernel = (graph.available(x) if scheme.history else fused.available(x, scheme.window)) and not scheme.hashed
        found: History | None = None
        if kernel:
            question = fused.Question(
                x, ids, keys.rank, keys.is_copy, layout, E, ep_rank, state.thresholds[layer], scheme.window,
                causal, scheme.nearest, local, by_sequence, pairs,
            )  # fmt: skip
            if scheme.history:
                assert history is None or isinstance(history, graph.Graph)
                _check_graph(graph.num_pairs(question), LARGEST_FUSED_GRAPH, T, scheme)
                answer, found = graph.decide(question, history)
            else:
                answer = fused.decide(question)
            return Condensed(scheme, answer.leader, keys.is_copy, answer.sent, answer.shared), found
        group, G = find_groups(ids, keys, layout, E, ep_rank, local=local, by_sequence=by_sequence, pairs=pairs)
        if scheme.hashed:
            leader = same_bucket(x, group, G, layout, int(scheme.level), layer)
        else:
            unit = _unit_rows(x)
            rows = make_windows(group, G, layout, scheme.window)
            threshold, token = state.thresholds[layer], torch.where(rows >= 0, rows // K, -1)
            if scheme.history:
                assert history is None or isinstance(history, SimilarityHistory)
                place, found = _with_history(unit, token, threshold, causal, scheme, history, layout)
            else:
                place = choose_representatives(unit, token, threshold, causal=causal, nearest=scheme.nearest)
            leader = leaders(rows, place, T * K)
        return _condensed(leader.unflatten(0, (T, K)), keys, scheme), found


def _unit_rows(x: Tensor) -> Tensor:
    """[T, D] scaled to length one, zeros left as they are; in float32 at least."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return x.to(wide) * torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=wide).clamp_min(1e-12).reciprocal()


def _check_graph(pairs: int, most: int, num_tokens: int, scheme: Condensation) -> None:
    if pairs > most:
        raise UserError(
            f"--condense {scheme.policy}: a graph over {num_tokens} tokens does not fit; its memory is quadratic, as "
            "published: lower --batch-size, or add ,window=128"
        )


def _condensed(leader: Tensor, keys: CopyKeys, scheme: Condensation) -> Condensed:
    """Who represents each copy, int64 [T, K] -> what becomes of it."""
    T, K = leader.shape
    own = torch.arange(T * K, device=leader.device).unflatten(0, (T, K))
    condensed = (leader != own) & keys.is_copy
    stands = torch.zeros(T * K + 1, dtype=torch.bool, device=leader.device)
    stands[torch.where(condensed, leader, T * K).flatten()] = True
    return Condensed(scheme, leader, keys.is_copy, keys.is_copy & ~condensed, stands[:-1].unflatten(0, (T, K)))


def _with_history(
    unit: Tensor,
    token: Tensor,
    threshold: float,
    causal: bool,
    scheme: Condensation,
    history: SimilarityHistory | None,
    layout: Layout,
) -> tuple[Tensor, SimilarityHistory]:
    """The paper's filter: pairs that the previous block settled are not looked at again. n^2 memory, as published."""
    T, W = unit.shape[0], token.shape[1]
    _check_graph(max(T, W) ** 2, LARGEST_GRAPH, T, scheme)
    known = None if history is None else history.codes_for(layout.global_token).flatten()
    table = torch.zeros(T * T + 1, dtype=torch.uint8, device=unit.device)
    places = []
    for part in token.split(max(1, _GRAPH_CHUNK // W**2)):
        real, at = part >= 0, part.clamp_min(0)
        tile = unit[at]
        similarity = tile @ tile.transpose(1, 2)
        pair = at[:, :, None] * T + at[:, None, :]  # [w, W, W]
        if known is not None:
            code = known[pair]
            similarity = similarity.masked_fill(code == 3, 1.0).masked_fill(code == 1, 0.0)
        places.append(settle(similarity, real, threshold, causal, scheme.nearest))
        code = (2 + (similarity > ALIKE).to(torch.uint8) - (similarity < UNLIKE).to(torch.uint8)).to(torch.uint8)
        table[torch.where(real[:, :, None] & real[:, None, :], pair, T * T)] = code
    return torch.cat(places), SimilarityHistory(layout.global_token, table[:-1].unflatten(0, (T, T)))


def only_sent(keys: CopyKeys, condensed: Condensed) -> CopyKeys:
    """The keys without the copies that do not travel."""
    return CopyKeys(condensed.sent, keys.rank.masked_fill(keys.is_copy > condensed.sent, -1))
