"""Recipes: named points on the axes along which an expert-parallel exchange can be changed.

There is one MoE layer; a recipe says what it does on each axis:

* `copies`: what one row on the wire stands for. "pairs": a (token, expert) pair, as in the classic systems;
  "ranks": a (token, rank) copy, sent once however many experts of that rank the token chose, answered with one
  partial sum.
* `placement`: where a sequence lives after the layer ("stay": where it came from; else a strategy of
  `luffy.plan.placement`). `look_ahead`: the strategy also prices the next layer's dispatch, predicted by applying
  the next router to the present stream.
* `residency`: which ranks hold experts of others while the layer runs ("static": none; "fetch": those that chose them;
  "shadow": all, of popular ones; see luffy.plan.residency. `--residency` overrides it).
* `condense`: which similar tokens share one row and its answer (`--condense` overrides it; see
  luffy.exchange.condense).
* `wire`: the formats in which rows cross links (`--wire` overrides it; see luffy.wire_format).
* `auto`: residency and placement of each layer are chosen while training (luffy.train.auto); `placement` and
  `look_ahead` say how sequences move where they do, `wire` and `condense` what may be chosen besides.
* `settles`: sequences move once, behind the first MoE layer, to where all later ones are expected to want them
  (luffy.plan.outlook), instead of behind each.
* `rehome_every`: steps between re-homings of experts, 0 for never (`--rehome-every` overrides it).

Recipes whose wire is "model" and that condense nothing are lossless: they compute the same function as a dense model
on one device.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from luffy.condensation import parse_condense
from luffy.config import ModelConfig
from luffy.errors import UserError
from luffy.wire_format import WireSpec, parse_wire


@dataclass(frozen=True)
class Recipe:
    """One way to run the exchange of every MoE layer."""

    name: str
    summary: str
    copies: str = "ranks"
    placement: str = "stay"
    look_ahead: bool = False
    rehome_every: int = 0
    condense: str = "none"
    wire: str = "model"
    residency: str = "static"
    auto: bool = False
    settles: bool = False

    @property
    def moves(self) -> bool:
        """Whether sequences may live elsewhere than where they were read."""
        return self.placement != "stay" or self.settles

    def at_layer(self, layer_of_moe: int) -> Recipe:
        """What the layer does that is the `layer_of_moe`-th MoE layer of its model."""
        if not self.settles:
            return self
        if layer_of_moe == 0:  # a row that others share, or that is not the stream, cannot carry a residual
            return replace(self, look_ahead=False, condense="none")
        return replace(self, placement="stay", look_ahead=False)

    @property
    def wire_spec(self) -> WireSpec:
        """The formats of rows. Where sequences or experts move, rows that stay are rounded as well: who stays follows
        from a plan that knows the whole batch, and must not tell a token of its future."""
        spec = parse_wire(self.wire)
        return spec if not self.moves and self.residency == "static" else replace(spec, local=True)


RESIDENCIES = ("static", "fetch", "shadow")

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
            "luffy_paper",
            "arXiv 2411.15419: sequence migration by Algorithm 1, token condensation by its similarity graph",
            placement="luffy_paper",
            condense="paper",
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
        Recipe(
            "luffy_settled",
            "lossless: as luffy, but sequences move once a step, to where all later layers are expected to want them",
            placement="best",
            rehome_every=250,
            settles=True,
        ),
        Recipe(
            "luffy_max",
            "fewest bits, not lossless: similar tokens share a corrected answer, rows travel as 4- and 8-bit integers",
            condense="static:0.9,correct",
            wire="aggressive",
        ),
        Recipe(
            "auto",
            "lossless: what the cost model finds fastest on these links, layer by layer, looked at again as it goes",
            placement="best",
            look_ahead=True,
            auto=True,
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
    scheme = parse_condense(recipe.condense)
    if recipe.auto and recipe.residency != "static":
        raise UserError(f"--recipe {recipe.name} chooses which ranks hold which experts; leave out --residency")
    if recipe.residency not in RESIDENCIES:
        raise UserError(f"--residency {recipe.residency}: choose one of {', '.join(RESIDENCIES)}")
    if recipe.residency != "static" and recipe.placement != "stay" and scheme is not None:
        raise UserError(
            f"--residency {recipe.residency} cannot be combined with --condense {recipe.condense} where sequences move "
            f"(--recipe {recipe.name}): who serves a choice would depend on what was condensed; use --residency static"
        )
    if recipe.residency != "static" and recipe.settles:
        raise UserError(
            f"--residency {recipe.residency} cannot be combined with --recipe {recipe.name}, which foretells rows of "
            "experts that stay; use --recipe luffy"
        )
    if recipe.residency != "static" and recipe.copies == "pairs" and recipe.placement != "stay":
        raise UserError(f"--residency {recipe.residency}: pairs do not migrate; use --recipe luffy")
    # `auto` condenses where sequences stay; where they settle, the layer behind which they move does not condense.
    if scheme is not None and recipe.placement != "stay" and not (recipe.auto or recipe.settles):
        at_home = {"lsh": scheme.hashed, "correct": scheme.compensate, "centroid": scheme.representative == "centroid",
                   "spread": scheme.gradient == "spread"}  # fmt: skip
        for name, yes in at_home.items():
            if yes:
                raise UserError(
                    f"--condense {recipe.condense} cannot be combined with --recipe {recipe.name}: with {name} a row "
                    "is not its token's own stream, which a sequence that moves would take; use --recipe vanilla_dedup"
                )
    if scheme is not None and not scheme.hashed and scheme.representative == "centroid" and config.causal:
        raise UserError(
            f"--condense {recipe.condense}: a mean of tokens would tell {config.name}, a decoder, of the future; leave "
            "out centroid"
        )
    parse_wire(recipe.wire)
    if config.memory_length and recipe.placement != "stay":
        raise UserError(
            f"--memory-length cannot be combined with --recipe {recipe.name}: the states of a segment stay on the rank "
            "that read it, and moving them would cost more than it saves; use --recipe vanilla_dedup"
        )
