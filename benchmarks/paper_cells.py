"""The runs that Tables 1 and 3 and Figure 8 read: every model of the paper with every way to exchange."""

from __future__ import annotations

from compare_tools import MODELS, Cell, Settings

RECIPES = "vanilla,vanilla_dedup,janus,fastermoe,netmoe,luffy;paper=luffy_paper"
SMALL_RECIPES = "vanilla,vanilla_dedup,janus,luffy;paper=luffy_paper"


def cells(s: Settings) -> list[Cell]:
    return [Cell(model, SMALL_RECIPES if s.small else RECIPES, s.model(model)) for model in MODELS]
