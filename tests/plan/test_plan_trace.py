"""Traces, their replay, and the mapping of experts that is planned from them."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from luffy.errors import UserError
from luffy.plan.mapping import plan_mapping
from luffy.plan.replay import Wire, deal, replay_step, rows_at_ranks, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import RoutingTrace, TraceStep, join_traces

from .problems import topology


def planted_step(seed: int, *, num_sequences=16, num_experts=8, layers=3, top_k=2, stray=0.1, domains=4) -> TraceStep:
    """Sequences of a few domains; in every layer a domain likes experts of its own, hidden by a permutation."""
    rng = np.random.default_rng(seed)
    lengths = rng.integers(0, 40, num_sequences)
    domain = np.repeat(rng.integers(0, domains, num_sequences), lengths)
    size = num_experts // domains
    chosen = np.empty((layers, len(domain), top_k), dtype=np.int16)
    for layer in range(layers):
        hidden = np.random.default_rng(layer).permutation(num_experts)  # the same in all steps
        for t, d in enumerate(domain):
            pool = np.arange(d * size, (d + 1) * size) if rng.random() >= stray else np.arange(num_experts)
            chosen[layer, t] = hidden[rng.choice(pool, top_k, replace=False)]
    return TraceStep(seed, lengths, deal(num_sequences, 4), chosen, chosen[1:].copy())


def make_trace(num_steps: int = 2, **changes) -> RoutingTrace:
    steps = tuple(planted_step(i, **changes) for i in range(num_steps))
    return RoutingTrace(steps, 8, 2, 64, 128, spread_evenly(steps[0].num_layers, 8, 4), {"model": "planted"})


def brute_force(step: TraceStep, owners: np.ndarray, homes: list[np.ndarray], copies: str, links: Topology) -> list:
    """Rows by link class of dispatch and combine, layer by layer, token by token."""
    out = []
    for layer, (before, after) in enumerate(pairwise(homes)):
        rows = {"dispatch": [0, 0, 0], "combine": [0, 0, 0]}
        token = 0
        for s, n in enumerate(step.lengths):
            for _ in range(n):
                ranks = [int(owners[layer][e]) for e in step.chosen[layer][token] if e >= 0]
                for r in set(ranks) if copies == "ranks" else ranks:
                    rows["dispatch"][links.link_class(int(before[s]), r)] += 1
                    rows["combine"][links.link_class(r, int(after[s]))] += 1
                token += 1
        out.append(rows)
    return out


@pytest.mark.parametrize(("strategy", "copies"), [("stay", "pairs"), ("stay", "ranks"), ("best", "ranks")])
def test_replayed_bytes_equal_a_count_token_by_token(strategy, copies):
    links = topology(4, 2)
    step = planted_step(1)
    step.chosen[0, :5, 1] = -1  # dropped by capacity
    owners = spread_evenly(3, 8, 4)
    replay = replay_step(step, owners, Wire(links, 10, strategy, "router" if strategy == "best" else "none", copies))
    homes = [replay[0].homes_before, *(x.homes_after for x in replay)]
    for layer, rows in zip(replay, brute_force(step, owners, homes, copies, links), strict=True):
        assert [n // 10 for n in layer.dispatch] == rows["dispatch"]
        assert [n // 10 for n in layer.combine] == rows["combine"]
        layer.plan.check(layer.problem)


def test_foresight_changes_the_plan_only_through_what_it_foresees():
    step, owners, links = planted_step(2), spread_evenly(3, 8, 4), topology(4)

    def moved(look_ahead):
        replay = replay_step(step, owners, Wire(links, 1, "best", look_ahead))
        return sum(sum(x.dispatch[1:]) + sum(x.combine[1:]) for x in replay)

    # The planted forecast is what happens, so both see the same future.
    assert moved("router") == moved("actual") < moved("none")


def test_a_planted_mapping_is_found_priced_on_other_steps_and_never_worse():
    owners, links = spread_evenly(3, 8, 4), topology(4)
    wire = Wire(links, 100, "best", "router")
    # Sequences enough for domains to be about as large as each other: budgets then hardly bind.
    fit, held_out = ([planted_step(i, num_sequences=96) for i in part] for part in (range(3), range(10, 13)))
    plan = plan_mapping(fit, held_out, owners, wire, expert_num_bytes=1000, steps_until_next=100)
    plan.check(4)
    assert plan.pays
    assert sum(plan.num_bytes[1:]) < 0.6 * sum(plan.present_num_bytes[1:])
    # What it says of the held-out steps is what a replay counts there, forward and backward, a step.
    replays = [replay_step(s, plan.owners, wire) for s in held_out]
    counted = sum(sum(x.dispatch[1:]) + sum(x.combine[1:]) for r in replays for x in r)
    assert sum(plan.num_bytes[1:]) == pytest.approx(2 * counted / 3, abs=2)
    again = plan_mapping(fit, held_out, plan.owners, wire, expert_num_bytes=1000, steps_until_next=100)
    assert links.weighted_bytes(again.num_bytes) <= 1.05 * links.weighted_bytes(plan.num_bytes)
    same = plan_mapping(fit, held_out, owners, wire, expert_num_bytes=1000, steps_until_next=100)
    np.testing.assert_array_equal(same.owners, plan.owners)


def test_experts_stay_where_moving_them_costs_more_than_it_saves():
    steps = [planted_step(i) for i in range(4)]
    plan = plan_mapping(
        steps[:2], steps[2:], spread_evenly(3, 8, 4), Wire(topology(4), 1, "best"), 10**9, steps_until_next=10
    )
    assert plan.num_moved and not plan.pays


def test_sequences_that_stay_leave_co_chosen_experts_to_gather():
    """Homes are dealt at random and stay, so only tokens whose experts share a rank can save rows."""
    owners, wire = spread_evenly(3, 8, 4), Wire(topology(4), 1)
    steps = [planted_step(i, stray=0.0) for i in range(4)]
    plan = plan_mapping(steps[:2], steps[2:], owners, wire, 0, 10, load_slack=None)
    assert sum(plan.num_bytes[1:]) < 0.7 * sum(plan.present_num_bytes[1:])
    rank = rows_at_ranks(steps[3], steps[3].chosen[0], plan.owners[0], 4, "ranks")
    assert rank.sum() == steps[3].lengths.sum()  # every token's two experts ended up together


def test_a_trace_comes_back_from_disk_and_damage_is_one_line(tmp_path):
    trace = make_trace()
    features = np.arange(-32, 32, dtype=np.int16).reshape(16, 4)
    trace = replace(trace, steps=(trace.steps[0], replace(trace.steps[1], features=features)))
    path = tmp_path / "trace" / "step.npz"
    trace.save(path)
    loaded = RoutingTrace.load(path)
    assert (loaded.about, loaded.row_num_bytes, len(loaded.steps)) == ({"model": "planted"}, 128, 2)
    np.testing.assert_array_equal(loaded.steps[1].chosen, trace.steps[1].chosen)
    assert loaded.steps[0].features is None
    assert loaded.steps[1].features.dtype == np.int16
    np.testing.assert_array_equal(loaded.steps[1].features, features)
    assert len(join_traces([trace, loaded]).steps) == 4
    assert [p.name for p in path.parent.iterdir()] == ["step.npz"]
    with pytest.raises(UserError, match=r"does not exist; .*--trace-every"):
        RoutingTrace.load(tmp_path / "none.npz")
    content = path.read_bytes()
    for broken in (content[: len(content) // 2], b"", b"text"):
        path.write_bytes(broken)
        with pytest.raises(UserError, match="damaged or no trace") as caught:
            RoutingTrace.load(path)
        assert "\n" not in str(caught.value)


def test_what_does_not_fit_is_refused():
    trace = make_trace()
    with pytest.raises(ValueError, match=r"outside 0\.\.7"):
        replace(trace, steps=(replace(trace.steps[0], chosen=trace.steps[0].chosen + 1),))
    with pytest.raises(ValueError, match="forecasts"):
        replace(trace, steps=(replace(trace.steps[0], foreseen=trace.steps[0].foreseen[:0]),))
    with pytest.raises(ValueError, match="features"):
        replace(trace, steps=(replace(trace.steps[0], features=np.zeros((3, 4))),))
    with pytest.raises(ValueError, match="different models"):
        join_traces([trace, make_trace(layers=2)])
    with pytest.raises(ValueError, match="do not divide"):
        spread_evenly(2, 8, 3)
    with pytest.raises(ValueError, match="steps, to fit and to judge"):
        plan_mapping([], trace.steps, trace.owners, Wire(topology(4), 1), 0, 1)
    with pytest.raises(ValueError, match="none of"):
        Wire(topology(4), 1, "best", "crystal")
