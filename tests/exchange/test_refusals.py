"""What cannot be combined is refused when it is put together, in one line that names the option and the mend."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from luffy.comm.clock import PhaseClock
from luffy.compose import check
from luffy.condensation import parse_condense
from luffy.config import model_preset
from luffy.errors import UserError
from luffy.exchange.condense import CondenseState
from luffy.exchange.condensing import Condensing
from luffy.exchange.direct import Direct
from luffy.exchange.dispatcher import Dispatcher
from luffy.exchange.hosting import Hosting
from luffy.exchange.planning import Planner
from luffy.exchange.rebuilding import Rebuilding
from luffy.exchange.residency import LayerResidency, ResidencyState
from luffy.exchange.tally import RowTally
from luffy.exchange.wire import Draws, Transport
from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology
from luffy.recipes import RECIPES, Recipe, get_recipe
from luffy.wire_format import parse_wire

CLOCK = PhaseClock(torch.device("cpu"))
NOBODY: Any = None  # dispatchers ask nothing of ranks and experts when they are made
GPT, BERT = model_preset("moe-gpt2-tiny"), model_preset("moe-bert-large-tiny")
RANDOM = Recipe("random", "random balanced plans", placement="random")


def direct(per: str = "ranks", wire: str = "model") -> Direct:
    return Direct(NOBODY, CLOCK, per, Transport(parse_wire(wire), Draws(0), 0), RowTally())


def condensing(inner: Dispatcher, text: str = "static:0.9") -> Condensing:
    scheme = parse_condense(text)
    assert scheme is not None
    return Condensing(inner, CondenseState(scheme), 0, causal=True, by_sequence=False)


def hosting(inner: Dispatcher) -> Hosting:
    return Hosting(inner, LayerResidency(ResidencyState(Topology.flat(2)), NOBODY, NOBODY, "fetch"), CLOCK)


def rebuilding(inner: Dispatcher) -> Rebuilding:
    planner = Planner(NOBODY, "random", Topology.flat(2), AttentionCost(8))
    return Rebuilding(inner, planner, 0, may_drop=False, looks_ahead=False)


def refusal(make: Any, *args: Any) -> str:
    """The one line in which something is refused."""
    with pytest.raises(UserError) as raised:
        make(*args)
    said = str(raised.value)
    assert "\n" not in said
    return said


def test_dispatchers_refuse_inner_ones_that_they_cannot_serve() -> None:
    said = refusal(hosting, condensing(direct()))
    assert said == "--residency cannot be combined with --condense; use --residency static"
    said = refusal(condensing, hosting(direct()))
    assert said.startswith("--condense static cannot be combined with --residency") and "use --residency static" in said
    assert refusal(rebuilding, hosting(direct())).startswith("--residency cannot be combined with a recipe that moves")
    assert "pairs" in refusal(lambda: rebuilding(direct("pairs")))
    assert "pairs" in refusal(lambda: rebuilding(condensing(direct("pairs"))))
    for wire in ("int8", "bf16", "combine_backward=int4-sr"):
        for inner in (direct(wire=wire), condensing(direct(wire=wire))):
            assert refusal(rebuilding, inner).startswith("--wire cannot be combined")
    for text in ("static:0.9,correct", "lsh:6", "lsh-causal:6"):
        assert refusal(lambda text=text: rebuilding(condensing(direct(), text))).startswith(f"--condense {text[:3]}")


def test_dispatchers_take_the_inner_ones_that_they_can_serve() -> None:
    for per in ("pairs", "ranks"):
        for wire in ("model", "int4"):
            condensing(direct(per, wire), "lsh:6")
            hosting(direct(per, wire))
    rebuilding(direct())
    rebuilding(direct(wire="model,local"))  # which changes no row
    rebuilding(condensing(direct(), "paper"))


@pytest.mark.parametrize(
    ("recipe", "option"),
    [
        (replace(get_recipe("netmoe"), residency="fetch"), "--residency"),
        (replace(get_recipe("luffy_paper"), condense="none", residency="shadow"), "--residency"),
        (replace(get_recipe("luffy_paper"), residency="shadow"), "--residency"),
        (replace(get_recipe("janus"), condense="static:0.9"), "--condense"),
        (replace(get_recipe("fastermoe"), condense="lsh:6"), "--condense"),
        (replace(get_recipe("netmoe"), wire="int8"), "--wire"),
        (replace(get_recipe("luffy_paper"), wire="bf16"), "--wire"),
        (replace(RANDOM, wire="combine_backward=int8"), "--wire"),
        (replace(get_recipe("luffy_paper"), condense="lsh:6"), "--condense lsh"),
        (replace(get_recipe("netmoe"), condense="static:0.9,correct"), "--condense static"),
        (replace(get_recipe("netmoe"), seats="learnt"), "--seats learnt"),
        (replace(RANDOM, copies="pairs"), "pairs"),
        (replace(RANDOM, seats="everywhere"), "--seats everywhere"),
        (replace(RANDOM, residency="lent"), "--residency lent"),
    ],
    ids=lambda v: v if isinstance(v, str) else f"{v.name} {v.residency} {v.condense} {v.wire}",
)
def test_recipes_that_cannot_be_are_refused_before_anything_starts(recipe: Recipe, option: str) -> None:
    for config in (GPT, BERT):
        assert option in refusal(check, recipe, config)


def test_memory_between_segments_stays_where_it_was_read() -> None:
    config = model_preset("moe-transformer-xl-tiny").override(memory_length=8)
    for recipe in ("luffy", "netmoe", "luffy_paper"):
        assert "--memory-length cannot be combined" in refusal(check, get_recipe(recipe), config)
    check(get_recipe("vanilla_dedup"), config)


def test_every_named_recipe_fits_every_kind_of_model() -> None:
    for recipe in RECIPES.values():
        for config in (GPT, BERT, model_preset("moe-llm-tiny")):
            check(recipe, config)


@pytest.mark.parametrize(
    "text",
    ["budget:0.1", "static:0.9,spread", "static:0.9,centroid", "static:1.5", "static:-2", "static", "static:x", "lsh:0",
     "lsh:2.5", "paper:1", "none:1", "best", "static:0.9,window=7", "none,local"],
)  # fmt: skip
def test_condensation_that_is_not_or_no_more_is_refused(text: str) -> None:
    assert refusal(parse_condense, text).startswith(f"--condense {text}")


@pytest.mark.parametrize("text", ["fp8", "fp8_e5m2", "int8,residual=int16", "int8,residual=model", "fp8-sr"])
def test_formats_that_are_no_more_are_refused(text: str) -> None:
    assert refusal(parse_wire, text).startswith(f"--wire {text}")


def test_recipes_that_are_no_more_are_refused() -> None:
    assert refusal(get_recipe, "luffy_settled").startswith("--recipe 'luffy_settled' is unknown")
