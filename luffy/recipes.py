"""Recipes: named points on the axes along which an expert-parallel exchange can be changed.

There is one MoE layer; a recipe names what stands around it. luffy.compose alone reads these fields and makes objects
of them:

* `seats`: where a step's sequences are computed ("as-read": where they were read; "learnt": where the rows that they
  are predicted to send are fewest; "topic": with the experts of what they are about; see luffy.seats. `--seats`).
* `copies`: what one row on the wire stands for. "pairs": a (token, expert) pair, as in the classic systems; "ranks": a
  (token, rank) copy, sent once however many experts of that rank the token chose, answered with one partial sum.
* `placement`: where a sequence lives after each layer ("stay": where it was; else a strategy of luffy.plan.placement).
  `look_ahead`: the strategy also prices the next layer's dispatch, predicted by the next router.
* `residency`: which ranks hold experts of others while the layer runs ("static": none; "fetch": those that chose them;
  "shadow": all, of popular ones. `--residency` overrides it).
* `condense`: which similar tokens share one row and its answer (`--condense` overrides it).
* `wire`: the formats in which rows cross links; `gradient_dtype`: in which gradients of weights are summed (`--wire`,
  `--gradient-dtype`).
* `rehome_every`: steps between re-homings of experts, 0 for never (`--rehome-every`).
* `auto`: whole modes are tried while training, and the fastest is kept (luffy/train/parts/tuning.py).

Recipes whose wire is "model" and that condense nothing are lossless: they compute the same function as a dense model
on one device.
"""

from __future__ import annotations

from dataclasses import dataclass

from luffy.errors import UserError
from luffy.wire_format import WireSpec, parse_wire


@dataclass(frozen=True)
class Recipe:
    """One way to run the exchange of every MoE layer."""

    name: str
    summary: str
    seats: str = "as-read"
    copies: str = "ranks"
    placement: str = "stay"
    look_ahead: bool = False
    residency: str = "static"
    condense: str = "none"
    wire: str = "model"
    gradient_dtype: str = "model"
    rehome_every: int = 0
    auto: bool = False

    @property
    def moves(self) -> bool:
        """Whether sequences move behind layers."""
        return self.placement != "stay"

    @property
    def wire_spec(self) -> WireSpec:
        return parse_wire(self.wire)


SEATS = ("as-read", "learnt", "topic")
RESIDENCIES = ("static", "fetch", "shadow")

RECIPES: dict[str, Recipe] = {
    r.name: r
    for r in (
        Recipe(
            "luffy",
            "lossless: each sequence is computed on the rank whose experts it will want, predicted from its token ids",
            seats="learnt",
            rehome_every=250,
        ),
        Recipe(
            "luffy_max",
            "luffy in few bits, not lossless: rows as 4-bit, gradients as 8-bit integers",
            seats="learnt",
            rehome_every=250,
            wire="int4",
            gradient_dtype="int8",
        ),
        Recipe(
            "luffy_paper",
            "arXiv 2411.15419: sequence migration by Algorithm 1, token condensation by its similarity graph",
            placement="luffy_paper",
            condense="paper",
        ),
        Recipe(
            "auto",
            "lossless: tries several ways while training and keeps the fastest (with --wire, low bits too)",
            seats="learnt",
            rehome_every=250,
            auto=True,
        ),
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
            "netmoe",
            "exact assignment over combine and predicted next dispatch, nodes first (NetMoE, ICLR 2025)",
            placement="netmoe",
            look_ahead=True,
        ),
        Recipe(
            "janus",
            "experts travel to the ranks that chose them, fetched during attention (EXT; Janus, SIGCOMM 2023)",
            residency="fetch",
        ),
        Recipe(
            "fastermoe",
            "popular experts are shadowed on every rank where its performance model says so (HYT; PPoPP 2022)",
            residency="shadow",
        ),
        Recipe(
            "lsh_moe",
            "tokens hashed alike share their centroid's answer (LSH-MoE, NeurIPS 2024; in decoders the future leaks)",
            condense="lsh:6",
        ),
        Recipe(
            "lsh_moe_causal",
            "LSH-MoE with each bucket's earliest token in place of its centroid: no future reaches a token",
            condense="lsh-causal:6,local",
        ),
    )
}


def recipe_of(recipe: str | Recipe) -> Recipe:
    """A recipe for a loop that is not our trainer's; raises UserError for one that only a trainer can run."""
    found = get_recipe(recipe) if isinstance(recipe, str) else recipe
    if isinstance(recipe, str) and found.auto:
        raise UserError(
            "--recipe auto tries modes between the steps of `luffy train` and `luffy finetune`; in a loop of your own "
            "take luffy, or luffy_max for few bits"
        )
    return found


def get_recipe(name: str) -> Recipe:
    """The recipe called `name`; raises `UserError` with the known names otherwise."""
    if name not in RECIPES:
        raise UserError(f"--recipe {name!r} is unknown; choose one of {', '.join(RECIPES)}")
    return RECIPES[name]
