"""The cost model that chooses: its parts by hand, and choices that must come out one way."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest

from luffy.plan.choose import LayerRates, Mode, layer_seconds, weigh
from luffy.plan.replay import Wire, replay_step
from luffy.plan.residency import ExpertCosts
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep
from luffy.wire_format import RowBytes

OWNER = np.array([[0, 1]])
SLOW = Topology.flat(2, 1e6)


def a_step(chosen: list[list[int]], sequences: int = 2) -> TraceStep:
    """One layer, top-1; sequences of equal length, the first half at rank 0."""
    ids = np.array(chosen).reshape(1, -1, 1)
    lengths = np.full(sequences, ids.shape[1] // sequences)
    homes = np.arange(sequences) * 2 // sequences
    return TraceStep(1, lengths, homes, ids, ids[:0])


def wire(**changes) -> Wire:
    return replace(Wire(SLOW, 100, expert_num_bytes=1000, expert_costs=ExpertCosts(0, 100, 10)), **changes)


def seconds(step: TraceStep, way: Wire, rates: LayerRates) -> float:
    (layer,) = replay_step(step, OWNER, way, step.home_rank)
    return layer_seconds(layer, way, rates)


def test_the_parts_by_hand() -> None:
    """Rank 0 sends three of four tokens away; rank 1 none of its own."""
    step, rates = a_step([0, 1, 1, 1, 1, 1, 1, 1]), LayerRates(pair=0.5, attention=0.0)
    rows = 3 * 100 / 1e6  # one way
    assert seconds(step, wire(), rates) == pytest.approx(4 * rows + 7 * 0.5)
    # Fetched, the expert crosses once and its gradient once, and four pairs are computed on each rank.
    expert = 1000 / 1e6
    assert seconds(step, wire(residency="fetch"), rates) == pytest.approx(2 * expert + 4 * 0.5)
    hidden = LayerRates(pair=0.5, attention=3 * 0.4 * expert)
    assert seconds(step, wire(residency="fetch"), hidden) == pytest.approx(1.6 * expert + 4 * 0.5)


def test_few_tokens_travel_themselves_and_many_have_experts_come() -> None:
    rates = LayerRates(1e-9, 0.0)
    few, many = a_step([0, 1, 1, 1]), a_step([0, 1] * 200)
    for step, expected in ((few, "static"), (many, "fetch")):
        table = weigh([step], OWNER, wire(), rates)
        assert min(table, key=table.__getitem__).residency == (expected,)


def test_narrow_rows_where_they_are_allowed_and_sequences_stay() -> None:
    formats = {"int8": RowBytes.uniform(30)}
    table = weigh([a_step([0, 1, 1, 1] * 50)], OWNER, wire(), LayerRates(1e-12, 0.0), formats=formats)
    static, narrow = (table[Mode(False, ("static",), f)] for f in ("model", "int8"))
    assert narrow == pytest.approx(0.3 * static, rel=1e-3)
    assert not any(m.moves for m in table if m.wire == "int8")
    assert Mode(False, ("static",), "int8").name == "vanilla_dedup+int8"


def test_a_mixture_takes_the_best_of_each_layer() -> None:
    at_home, mixed = a_step([0] * 200 + [1] * 200), a_step([0, 1] * 200)
    both = TraceStep(1, mixed.lengths, mixed.home_rank, np.concatenate([at_home.chosen, mixed.chosen]), mixed.chosen)
    table = weigh([both], np.repeat(OWNER, 2, axis=0), wire(expert_num_bytes=5000), LayerRates(1e-12, 0.0))
    best = min((m for m in table if not m.moves), key=table.__getitem__)
    assert best == Mode(False, ("static", "fetch")) or table[best] == table[Mode(False, ("fetch", "fetch"))]
    assert table[Mode(False, ("static", "fetch"))] < table[Mode(False, ("static", "static"))]


def test_layers_are_replayed_each_in_its_residency() -> None:
    mixed = a_step([0, 1] * 200)
    both = TraceStep(1, mixed.lengths, mixed.home_rank, np.concatenate([mixed.chosen] * 2), mixed.chosen)
    owners = np.repeat(OWNER, 2, axis=0)
    static, fetch, each = (
        replay_step(both, owners, wire(residency=r), both.home_rank) for r in ("static", "fetch", ("static", "fetch"))
    )
    assert [r.dispatch for r in each] == [static[0].dispatch, fetch[1].dispatch]
    assert [r.experts for r in each] == [static[0].experts, fetch[1].experts]
    assert static[1].dispatch != fetch[1].dispatch


def test_a_mode_that_is_asked_for_is_weighed_and_one_goes_through_json() -> None:
    mode = Mode(True, ("shadow",))
    odd = Mode(False, ("fetch",), "int8")
    formats = {"int8": RowBytes.uniform(30)}
    step, rates = a_step([0, 1, 1, 1] * 50), LayerRates(1e-12, 0.0)
    assert weigh([step], OWNER, wire(), rates, also=mode)[mode] == weigh([step], OWNER, wire(), rates)[mode]
    assert odd in weigh([step], OWNER, wire(), rates, formats=formats, also=odd)
    for m in (mode, odd, replace(odd, condenses=True)):
        assert Mode.from_dict(json.loads(json.dumps(m.to_dict()))) == m


def test_modes_have_the_names_of_the_recipes_they_amount_to() -> None:
    names = [Mode(m, (k, k)).name for m in (False, True) for k in ("static", "fetch", "shadow")]
    assert names == ["vanilla_dedup", "janus", "fastermoe", "migrate", "migrate+fetch", "migrate+shadow"]
    assert Mode(False, ("fetch", "static")).name == "stay (static 1,fetch 1)"
    assert Mode(False, ("static",), "int8", True).name == "vanilla_dedup+int8+condensed"
