"""The decision what to condense: in torch against loops over plain numpy, fused (interpreted) against torch."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from luffy.condensation import parse_condense
from luffy.data.batch import Layout, SequenceTable
from luffy.plan.condensation import cosines, representatives, similarity_edges
from luffy.testing.alike import AlikeLayer, alike_layer

from .deciding import LENGTHS, ROUTINGS, THRESHOLDS
from .interpreted import interpret


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("by_sequence", [False, True])
@pytest.mark.parametrize("causal", [True, False])
def test_in_torch_it_is_what_going_through_the_windows_by_hand_gives(causal, by_sequence):
    condensed = 0
    for seed, lengths in enumerate(LENGTHS * 6):
        E, K, N, pairs = ROUTINGS[seed % len(ROUTINGS)]
        layer = alike_layer(seed, lengths, 24, E, K, N, dtype=torch.float64, pairs=pairs)
        window, local = (16, 32)[seed % 2], seed % 3 > 0
        scheme = parse_condense(f"static:0.5,window={window}{',local' if local else ''}")
        assert scheme is not None
        scheme = replace(scheme, nearest=seed % 4 > 0)
        threshold = THRESHOLDS[seed % len(THRESHOLDS)]
        got = layer.decide(scheme, threshold, causal=causal, by_sequence=by_sequence, kernel=False)
        expected, stands = _by_hand(layer, window, threshold, causal, by_sequence, local or by_sequence, scheme.nearest)
        assert got.leader.flatten().tolist() == expected
        assert got.shared.flatten().nonzero().flatten().tolist() == sorted(stands)
        own = torch.arange(layer.ids.numel()).view_as(layer.ids)
        assert torch.equal(got.sent, layer.keys.is_copy & (got.leader == own))
        condensed += int((got.copy & ~got.sent).sum())
    assert condensed > 300


def _by_hand(
    layer: AlikeLayer, window: int, threshold: float, causal: bool, by_sequence: bool, local: bool, nearest: bool
) -> tuple[list[int], set[int]]:
    """(leader of each copy, copies that lead another), from choices and positions alone."""
    (T, K), rank_of = layer.ids.shape, lambda e: e // max(1, layer.num_experts // layer.ep_size)
    place = [(p, s) for s, n in enumerate(layer.lengths) for p in range(n)]
    groups: dict[tuple[int, int], list[int]] = {}
    for t in sorted(range(T), key=lambda t: place[t]):
        ids = layer.ids[t].tolist()
        for k, e in enumerate(ids):
            alone = e >= 0 and (layer.pairs or sum(f >= 0 and rank_of(f) == rank_of(e) for f in ids) == 1)
            if alone and (local or rank_of(e) != 0):
                groups.setdefault((e, place[t][1] if by_sequence else 0), []).append(t * K + k)
    leader, stands = list(range(T * K)), set()
    for members in groups.values():
        for first in range(0, len(members), window):
            part = np.array(members[first : first + window])
            similarity = cosines(layer.x[part // K].numpy())
            edges = similarity_edges(similarity, threshold, causal)
            for copy, to in zip(part, representatives(edges, similarity, causal=causal, nearest=nearest), strict=True):
                leader[copy] = int(part[to])
                stands |= {leader[copy]} - {copy}
    return leader, stands


def test_tokens_in_time_are_the_order_of_moments():
    for lengths in ([3, 1, 4, 1, 5], [7], [], [2, 2]):
        layout = Layout(
            SequenceTable(np.array(lengths, dtype=np.int64), np.zeros(len(lengths))), 0, torch.device("cpu")
        )
        assert layout.tokens_in_time.tolist() == layout.moment.argsort().tolist()


@pytest.mark.slow
def test_the_kernels_decide_as_torch_does():
    condensed = interpret("deciding", timeout=900).split("condensed alike:")[1].split()
    assert [int(n) > least for n, least in zip(condensed, (500, 100, 30, 5000), strict=True)] == [True] * 4, condensed
