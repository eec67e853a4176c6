"""What `--recipes` says: recipes by name, or with options of their own and a name of one's choice.

    vanilla,netmoe,luffy
    vanilla;luffy --locality-loss 0.02;both=luffy_paper --condense static:0.9

Semicolons separate entries. Commas separate names; an option belongs to the last name before it, so what stands in
its value (`--wire dispatch=int4,combine=int8`) is never taken for a name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from typing import Any

from luffy.errors import UserError
from luffy.recipes import get_recipe
from luffy.train.option_parser import parse_options
from luffy.train.options import TrainOptions

# What all runs of a comparison share, or what the comparison decides itself.
SHARED = (
    "recipe",
    "out",
    "resume",
    "overwrite",
    "ranks",
    "data",
    "text_field",
    "tokenizer",
    "seed",
    "device",
    "backend",
)


@dataclass(frozen=True)
class Entry:
    """One recipe of a comparison. `label` names it in tables, `folder` on the disk; `options` are its own."""

    label: str
    recipe: str
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        return re.sub(r"[^\w.+-]+", "_", self.label.replace(" --", " ")).strip("_.")

    def apply(self, shared: TrainOptions) -> TrainOptions:
        """The options of its runs; raises UserError as TrainOptions does."""
        return replace(shared, recipe=self.recipe, **self.options)


def parse_entries(text: str) -> list[Entry]:
    """Raises UserError, naming --recipes, for an unknown recipe or option, a repetition, or fewer than two."""
    entries = [entry for part in text.split(";") if part.strip() for entry in _parse_part(part.strip())]
    labels = [entry.label for entry in entries]
    if len(entries) < 2:
        raise UserError(f"--recipes {text!r}: name at least two different recipes, separated by commas or semicolons")
    for entry in entries:
        if labels.count(entry.label) > 1 or sum(e.folder == entry.folder for e in entries) > 1:
            raise UserError(
                f"--recipes {text!r}: {entry.label!r} is there twice; give one of them another name, as in "
                f"mine={entry.recipe}"
            )
    return entries


def _parse_part(part: str) -> list[Entry]:
    names, dashes, rest = part.partition(" --")
    options = (dashes + rest).strip()
    entries = []
    listed = [name.strip() for name in names.split(",") if name.strip()]
    if not listed:
        raise UserError(f"--recipes {part!r}: an option without a recipe before it")
    for i, name in enumerate(listed):
        own = options if i == len(listed) - 1 else ""
        label, equals, recipe = (word.strip() for word in name.rpartition("="))
        try:
            get_recipe(recipe)
        except UserError as error:
            raise UserError(f"--recipes: {str(error).removeprefix('--recipe ')}") from error
        said = parse_options(own, SHARED, f"--recipes {recipe} {own}") if own else {}
        entries.append(Entry(label if equals else f"{recipe} {own}".strip(), recipe, said))
    return entries
