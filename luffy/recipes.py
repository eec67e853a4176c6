"""Recipes: named points on the axes along which an expert-parallel exchange can be changed.

There is one MoE layer; a recipe says what it does on each axis:

* `copies`: what one row on the wire stands for. "pairs": a (token, expert) pair, as in the classic systems;
  "ranks": a (token, rank) copy, sent once however many experts of that rank the token chose, answered with one
  partial sum.
* `placement`: where a sequence lives after the layer ("stay": where it came from; else a strategy of
  `luffy.plan.placement`). `look_ahead`: the strategy also prices the next layer's dispatch, predicted by applying
  the next router to the present stream.
* `rehome_every`: steps between re-homings of experts, 0 for never (`--rehome-every` overrides it).

Lossless recipes compute the same function as a dense model on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

from luffy.config import ModelConfig
from luffy.errors import UserError


@dataclass(frozen=True)
class Recipe:
    """One way to run the exchange of every MoE layer."""

    name: str
    summary: str
    copies: str = "ranks"
    placement: str = "stay"
    look_ahead: bool = False
    rehome_every: int = 0


RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(
            "vanilla",
            "every (token, expert) pair travels on its own, as in GShard and DeepSpeed-MoE",
            copies="pairs",
        ),
        Recipe(
            "vanilla_dedup",
            "a token travels once to each rank that holds any of its experts; partial sums come back",
        ),
        Recipe(
            "luffy_paper",
            "sequence migration by Algorithm 1 of arXiv 2411.15419 (without token condensation)",
            placement="luffy_paper",
        ),
        Recipe(
            "netmoe",
            "exact assignment over combine and predicted next dispatch, nodes first (NetMoE, ICLR 2025)",
            placement="netmoe",
            look_ahead=True,
        ),
        Recipe(
            "luffy",
            "lossless: deduplicated copies, sequences rebuilt where their experts are, experts re-homed if that pays",
            placement="best",
            look_ahead=True,
            rehome_every=250,
        ),
    )
}


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`; raises `UserError` with the known names otherwise."""
    if name not in RECIPES:
        raise UserError(f"--recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]


def check_recipe(recipe: Recipe, config: ModelConfig) -> None:
    """Raise UserError where a recipe cannot train a model."""
    if config.memory_length and recipe.placement != "stay":
        raise UserError(
            f"--memory-length cannot be combined with --recipe {recipe.name}: the states of a segment stay on the rank "
            "that read it, and moving them would cost more than it saves; use --recipe vanilla_dedup"
        )
