"""Condensed training is the exact derivative of the condensed forward, tells no token its future, and costs the bytes
that counting by hand finds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

import luffy.model.moe_layer as moe_layer
from luffy.comm import RowExchange
from luffy.condensation import Condensation, parse_condense
from luffy.data.batch import Layout, SequenceTable
from luffy.errors import UserError
from luffy.exchange import Condensed, CondenseState, ExpertMap, Received, condense, copy_keys, tally
from luffy.exchange.copies import Copies
from luffy.exchange.planning import kept_off_the_wire
from luffy.plan.condensation import cosines, filtered, representatives, similarity_edges
from luffy.recipes import Recipe, check_recipe, get_recipe
from luffy.testing import random_sequences, run_ranks

from .cases import DECODERS, TINY_PRESETS, Case, build, shrunk
from .condensing import assert_condensed_exact, condensed_step, in_order, whole
from .leaks import LENGTH, states_and_outputs
from .placing import Trial, place

STAY = Recipe("stay", "", condense="static:0.3")
PAIRS = replace(STAY, copies="pairs")
MOVE = Recipe("move", "random plans", placement="random", condense="static:0.3")
CORRECT = replace(STAY, condense="static:0.3,correct,local")
LUFFY = replace(get_recipe("luffy"), condense="static:0.3")
BUDGET = replace(LUFFY, condense="budget:0.5")
SETTLED = replace(get_recipe("luffy_settled"), condense="static:0.3,correct")


@pytest.mark.parametrize("preset", TINY_PRESETS)
def test_it_equals_the_oracle_that_is_told_who_stands_for_whom(preset):
    for recipe, world in ((STAY, 2), (MOVE, 4)):
        config = shrunk(preset, num_shared_experts=1)
        kept = assert_condensed_exact(Case(config, world=world, recipe=recipe, batch=8))
        assert 0.2 < kept < 0.95


@pytest.mark.parametrize("recipe", [PAIRS, CORRECT, LUFFY, BUDGET, SETTLED,
                                    *map(get_recipe, ("luffy_paper", "lsh_moe", "lsh_moe_causal"))],
                         ids=lambda r: f"{r.name}-{r.condense}")  # fmt: skip
@pytest.mark.parametrize("preset", ["moe-gpt2-tiny", "moe-bert-large-tiny"])
def test_every_scheme_equals_the_oracle(preset, recipe):
    if recipe.name.startswith("lsh"):
        recipe = replace(recipe, condense=recipe.condense.replace("6", "1"))  # few tokens: large buckets
    kept = assert_condensed_exact(Case(shrunk(preset, num_layers=3), world=2, recipe=recipe, batch=8))
    assert kept < 0.97


def test_it_equals_the_oracle_with_more_experts_a_token_capacity_and_recomputation():
    for changes in ({"top_k": 4}, {"num_experts": 4, "capacity_factor": 0.7}, {"moe_every": 2, "num_layers": 4}):
        case = Case(shrunk("moe-llm-tiny", **changes), world=4, recipe=MOVE, batch=8, recompute=True, padded=True)
        assert_condensed_exact(case)


def test_a_threshold_that_nothing_reaches_is_the_uncondensed_step_bit_for_bit(monkeypatch):
    out_of_reach = {"none": None, "static:1": Condensation("static", 1.5)}
    monkeypatch.setattr("luffy.model.moe_layer.parse_condense", out_of_reach.__getitem__)
    for recipe in (STAY, PAIRS, LUFFY):
        case = Case(shrunk("moe-gpt2-tiny"), world=2, recipe=replace(recipe, condense="static:1"), batch=8)
        neutral = run_ranks(condensed_step, 2, case)
        plain = run_ranks(condensed_step, 2, replace(case, recipe=replace(recipe, condense="none")))
        assert neutral[0]["seen"] and not plain[0]["seen"]
        assert all(s["sent"].sum() == s["copy"].sum() for r in neutral for s in r["seen"])
        assert neutral[0]["loss"] == plain[0]["loss"]
        for name, gradient in plain[0]["gradients"].items():
            np.testing.assert_array_equal(neutral[0]["gradients"][name], gradient, err_msg=name)


def _states(rank: int, case: Case, changes: list[tuple[int, int] | None]) -> list[tuple[np.ndarray, int]]:
    """As in training, for each (sequence, place) whose token changes: last states, and how many copies were spared."""
    return [
        (states, int((out.aux.totals.condensed[:, 0] - out.aux.totals.condensed[:, 1]).sum()))
        for states, out in states_and_outputs(case, changes)
    ]


@pytest.mark.parametrize("preset", DECODERS)
def test_no_future_reaches_a_token(preset):
    paper = get_recipe("luffy_paper")
    causal_lsh = Recipe("lsh", "", condense="lsh-causal:1")
    for recipe in (STAY, LUFFY, MOVE, BUDGET, SETTLED, paper, replace(paper, placement="stay"), causal_lsh):
        case = Case(shrunk(preset, num_layers=3), world=2, recipe=recipe, batch=8)
        changes = [None, (0, 0), (1, 3), (2, 6), (3, 9), (6, LENGTH - 1)]
        (before, spared), *after = run_ranks(_states, 2, case, changes)[0]
        assert spared > 20
        for change, (states, _) in zip(changes[1:], after, strict=True):
            moved = np.abs(states - before).max(-1)  # [sequences, LENGTH]
            assert moved[change] > 1e-2
            assert moved[:, : change[1]].max(initial=0) < 1e-12 * np.abs(before).max(), (recipe, change)


def test_the_published_lsh_leaks_and_the_probe_sees_it():
    case = Case(shrunk("moe-gpt2-tiny"), world=2, recipe=Recipe("lsh", "", condense="lsh:1"), batch=8)
    (before, _), (after, _) = run_ranks(_states, 2, case, [None, (3, 9)])[0]
    assert np.abs(after - before).max(-1)[:, :9].max() > 1e-6


def test_evaluation_is_never_condensed():
    run_ranks(_evaluate, 2, Case(shrunk("moe-gpt2-tiny"), world=2, recipe=LUFFY, batch=8))


def _evaluate(rank: int, case: Case) -> None:
    sequences = random_sequences(case.batch, case.config.vocab_size, seed=11, lengths="equal", longest=LENGTH)
    losses = []
    for recipe in (case.recipe, replace(case.recipe, condense="none")):
        model, comm = build(replace(case, recipe=recipe))
        with torch.no_grad():
            out = model(place(Trial(sequences, tuple(i % 2 for i in range(8))), comm))
            assert out.aux.totals.condensed.abs().sum() == 0
        losses.append(float(out.token_loss))
    assert losses[0] == losses[1]


def test_bytes_are_those_that_counting_by_hand_finds():
    D, row = 32, 32 * 8  # float64
    for recipe in (STAY, LUFFY, MOVE):
        case = Case(shrunk("moe-gpt2-tiny", hidden_size=D, num_layers=3), world=4, recipe=recipe, batch=8)
        results = run_ranks(condensed_step, 4, case)
        measured = {d: sum(r["bytes"][d] for r in results) for d in results[0]["bytes"]}
        layers = [whole(results, i) for i in range(3)]
        homes = [layer["home"] for layer in [*layers[1:], in_order([r["last"] for r in results])]]
        dispatch = combine = spared = 0
        for layer, new_home in zip(layers, homes, strict=True):
            for t, b in enumerate(new_home):
                columns = (layer["rank"][t], layer["shared"][t], layer["sent"][t])
                sent = {int(r): bool(shared) for r, shared, yes in zip(*columns, strict=True) if yes}
                home = layer["home"][t]
                dispatch += sum(r != home for r in sent)
                combine += sum(r != b for r in sent)
                combine += b != home and b not in sent and all(sent.values())  # no row can carry the residual
                spared += (layer["copy"][t] & ~layer["sent"][t]).sum()
        assert spared > 50
        assert measured["dispatch"] == measured["dispatch_backward"] == dispatch * row
        assert measured["combine"] == measured["combine_backward"] == combine * row


def test_the_planner_prices_the_residuals_that_no_row_carries():
    """One class of links: what a plan says that placing a sequence costs is what it then puts on the wire."""
    rng = np.random.default_rng(0)
    S, N = 6, 4
    counts, needy = rng.integers(0, 9, (S, N)), rng.integers(3, 9, S)
    alone, home = needy[:, None] - rng.integers(0, 4, (S, N)), rng.integers(0, N, S)
    rows = counts + kept_off_the_wire(alone, home)
    for s in range(S):
        wire = [counts[s].sum() - counts[s, j] + (alone[s, j] if j != home[s] else 0) for j in range(N)]
        priced = rows[s].sum() - rows[s]
        np.testing.assert_array_equal(priced - priced[home[s]], np.array(wire) - wire[home[s]])


def test_the_audit_measures_the_error_of_what_would_have_been_shared():
    rows = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    ids = torch.zeros(5, 1, dtype=torch.int64)
    idle = RowExchange(None, (), (), idle=True)  # type: ignore[arg-type]  # one rank, nothing to exchange
    received = Received(
        rows,
        ids,
        ids.double(),
        Copies(torch.arange(5), 5, idle, 5, 1, torch.arange(5)[:, None]),
        shared=ids > 0,
        audit=torch.tensor([0, -1, 0, -3, 0]),
    )
    flags = torch.tensor([[True], [True], [False]])
    condensed = Condensed(
        parse_condense("budget:0.1"),
        torch.arange(3)[:, None],
        flags,
        flags & (torch.arange(3) == 0)[:, None],
        flags,
        ids[:3],
    )
    counted = tally(condensed, received, rows)
    squares = ((rows[1] - rows[0]) ** 2).sum() + ((rows[3] - rows[0]) ** 2).sum()
    expected = [2, 1, 2, squares, (rows[1] ** 2).sum() + (rows[3] ** 2).sum()]
    torch.testing.assert_close(counted, torch.tensor(expected, dtype=torch.float64))


def test_an_audit_of_every_copy_spares_nothing_and_changes_nothing():
    case = Case(shrunk("moe-gpt2-tiny"), world=2, recipe=BUDGET, batch=8)
    results = run_ranks(_audit_everything, 2, case)
    assert results[0]["loss"] == pytest.approx(run_ranks(condensed_step, 2, replace(
        case, recipe=replace(LUFFY, condense="none")))[0]["loss"], rel=1e-12)  # fmt: skip
    assert sum(s["audited"].sum() for r in results for s in r["seen"]) > 50


def _audit_everything(rank: int, case: Case) -> dict[str, Any]:
    moe_layer.parse_condense = lambda text: replace(parse_condense(text), audit_share=1.0)
    return condensed_step(rank, case)


def test_nonsense_is_refused_naming_the_option():
    for text in ("static", "static:x", "static:3", "budget:2", "lsh:0", "lsh:2.5", "paper:1", "none:1", "best"):
        with pytest.raises(UserError, match="--condense"):
            parse_condense(text)
    with pytest.raises(UserError, match="--condense lsh:6 cannot be combined with --recipe luffy"):
        check_recipe(replace(LUFFY, condense="lsh:6"), shrunk("moe-gpt2-tiny"))


def test_the_history_filter_is_the_references():
    """Two blocks over the same tokens, one expert: what the first settled the second does not look at again."""
    g = torch.Generator().manual_seed(3)
    first, second = (torch.randn(20, 3, generator=g, dtype=torch.float64) for _ in range(2))
    layout = Layout(SequenceTable(np.array([12, 8]), np.zeros(2, dtype=np.int64)), 0, torch.device("cpu"))
    ids = torch.zeros(20, 1, dtype=torch.int64)
    experts = ExpertMap(torch.arange(2), 1)
    keys = copy_keys(ids, experts, 0, "ranks")
    state, rest = CondenseState(parse_condense("paper"), [0.6, 0.6]), {"causal": True, "by_sequence": False}
    _, history = condense(state, 0, first, ids, keys, layout, experts, 0, pairs=False, **rest)
    got, _ = condense(state, 1, second, ids, keys, layout, experts, 0, pairs=False, history=history, **rest)
    order = layout.moment.argsort().numpy()
    similarity = filtered(cosines(second.numpy()[order]), cosines(first.numpy()[order]))
    edges = similarity_edges(similarity, 0.6, True)
    expected = order[representatives(edges, similarity, causal=True, nearest=False)]
    assert (got.leader.flatten().numpy()[order] == expected).all()
    plain, _ = condense(state, 1, second, ids, keys, layout, experts, 0, pairs=False, **rest)
    assert (plain.leader != got.leader).any()
