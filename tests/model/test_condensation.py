"""Condensed training is the exact derivative of the condensed forward, tells no token its future, and costs the bytes
that counting by hand finds.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from luffy.condensation import parse_condense
from luffy.data.batch import Layout, SequenceTable
from luffy.exchange.condense import CondenseState, condense
from luffy.exchange.copies import ExpertMap, copy_keys
from luffy.exchange.planning import kept_off_the_wire
from luffy.plan.condensation import cosines, filtered, representatives, similarity_edges
from luffy.recipes import Recipe, get_recipe
from luffy.testing import random_sequences, run_ranks

from .cases import DECODERS, PRESETS, Case, build, shrunk
from .condensing import Threshold, assert_condensed_exact, condensed_step, in_order, switch_off, whole
from .leaks import LENGTH, states_and_outputs
from .placing import Trial, place

STAY = Recipe("stay", "", condense="static:0.3")
PAIRS = replace(STAY, copies="pairs")
MOVE = Recipe("move", "random plans", placement="random", condense="static:0.3")
CORRECT = replace(STAY, condense="static:0.3,correct,local")
NETMOE = replace(get_recipe("netmoe"), condense="static:0.3")
PAPER = get_recipe("luffy_paper")
# Few tokens: large buckets.
LSH, CAUSAL_LSH = (Recipe(name, "", condense=f"{name}:1") for name in ("lsh", "lsh-causal"))


@pytest.mark.parametrize("preset", PRESETS)
def test_it_equals_the_oracle_that_is_told_who_stands_for_whom(preset):
    for recipe, world in ((STAY, 2), (MOVE, 4)):
        config = shrunk(preset, num_shared_experts=1)
        kept = assert_condensed_exact(Case(config, world=world, recipe=recipe, batch=8))
        assert 0.2 < kept < 0.95


@pytest.mark.parametrize("recipe", [PAIRS, CORRECT, NETMOE, PAPER, LSH, CAUSAL_LSH],
                         ids=lambda r: f"{r.name}-{r.condense}")  # fmt: skip
@pytest.mark.parametrize("preset", ["moe-gpt2-tiny", "moe-bert-large-tiny"])
def test_every_scheme_equals_the_oracle(preset, recipe):
    kept = assert_condensed_exact(Case(shrunk(preset, num_layers=3), world=2, recipe=recipe, batch=8))
    assert kept < 0.97


@pytest.mark.slow
def test_it_equals_the_oracle_with_more_experts_a_token_capacity_and_recomputation():
    for changes in ({"top_k": 4}, {"num_experts": 4, "capacity_factor": 0.7}, {"moe_every": 2, "num_layers": 4}):
        case = Case(shrunk("moe-llm-tiny", **changes), world=4, recipe=MOVE, batch=8, recompute=True, padded=True)
        assert_condensed_exact(case)


def _neutral(rank: int, case: Case, recipes: list[Recipe]) -> list[list[dict[str, Any]]]:
    """A step of each recipe: condensing where nothing is alike enough, switched off, and without condensing."""
    alike_to_nobody = Threshold(2.0)
    return [
        [
            condensed_step(rank, replace(case, recipe=recipe), prepare=alike_to_nobody),
            condensed_step(rank, replace(case, recipe=recipe), prepare=switch_off),
            condensed_step(rank, replace(case, recipe=replace(recipe, condense="none"))),
        ]
        for recipe in recipes
    ]


def test_where_nothing_is_alike_it_is_the_uncondensed_step_bit_for_bit():
    case = Case(shrunk("moe-gpt2-tiny"), world=2, batch=8)
    results = run_ranks(_neutral, 2, case, [STAY, PAIRS, NETMOE])
    for neutral, off, plain in results[0]:
        assert neutral["seen"] and not off["seen"] and not plain["seen"]
        assert all(s["sent"].sum() == s["copy"].sum() for s in neutral["seen"])
        for other in (neutral, off):
            assert other["loss"] == plain["loss"]
            for name, gradient in plain["gradients"].items():
                np.testing.assert_array_equal(other["gradients"][name], gradient, err_msg=name)


def _states(rank: int, case: Case, changes: list[tuple[int, int] | None]) -> list[tuple[np.ndarray, int]]:
    """As in training, for each (sequence, place) whose token changes: last states, and how many copies were spared."""
    return [
        (states, int((out.aux.totals.condensed[:, 0] - out.aux.totals.condensed[:, 1]).sum()))
        for states, out in states_and_outputs(case, changes)
    ]


def _all_states(rank: int, case: Case, recipes: list[Recipe], changes: list) -> list[list[tuple[np.ndarray, int]]]:
    return [_states(rank, replace(case, recipe=recipe), changes) for recipe in recipes]


@pytest.mark.parametrize("preset", DECODERS)
def test_no_future_reaches_a_token(preset):
    changes = [None, (0, 0), (1, 3), (2, 6), (3, 9), (6, LENGTH - 1)]
    recipes = [STAY, MOVE, NETMOE, PAPER, replace(PAPER, placement="stay"), CAUSAL_LSH]
    case = Case(shrunk(preset, num_layers=3), world=2, batch=8)
    for recipe, seen in zip(recipes, run_ranks(_all_states, 2, case, recipes, changes)[0], strict=True):
        (before, spared), *after = seen
        assert spared > 20
        for change, (states, _) in zip(changes[1:], after, strict=True):
            moved = np.abs(states - before).max(-1)  # [sequences, LENGTH]
            assert moved[change] > 1e-2
            assert moved[:, : change[1]].max(initial=0) < 1e-12 * np.abs(before).max(), (recipe, change)


def test_the_published_lsh_leaks_and_the_probe_sees_it():
    case = Case(shrunk("moe-gpt2-tiny"), world=2, recipe=LSH, batch=8)
    (before, _), (after, _) = run_ranks(_states, 2, case, [None, (3, 9)])[0]
    assert np.abs(after - before).max(-1)[:, :9].max() > 1e-6


def test_evaluation_is_never_condensed():
    run_ranks(_evaluate, 2, Case(shrunk("moe-gpt2-tiny"), world=2, recipe=NETMOE, batch=8))


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


def _steps(rank: int, case: Case, recipes: list[Recipe]) -> list[dict[str, Any]]:
    return [condensed_step(rank, replace(case, recipe=recipe)) for recipe in recipes]


def test_bytes_are_those_that_counting_by_hand_finds():
    D, row = 32, 32 * 8  # float64
    case = Case(shrunk("moe-gpt2-tiny", hidden_size=D, num_layers=3), world=4, batch=8)
    for results in zip(*run_ranks(_steps, 4, case, [STAY, NETMOE, MOVE]), strict=True):
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
