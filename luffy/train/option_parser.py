"""The fields of TrainOptions as options of a command, and the reading of a few of them from a line of text."""

from __future__ import annotations

import shlex
import types
import typing
from collections.abc import Callable, Collection, Container
from dataclasses import fields
from typing import Any

import click
from click.core import ParameterSource

from luffy.errors import UserError
from luffy.train.commands import GroupedOption
from luffy.train.options import TrainOptions, option_name


def _click_type(annotation: Any) -> Any:
    """int for `int` and `int | None`, and so on."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


def options_of(cls: type[TrainOptions], names: Container[str] | None = None) -> Callable[[Any], Any]:
    """Give a click command one option for each field of `cls`, in their order; names: only those."""

    def decorate(command: Callable[..., Any]) -> Callable[..., Any]:
        hints = typing.get_type_hints(cls)
        for f in reversed(fields(cls)):
            if names is not None and f.name not in names:
                continue
            kind, name = _click_type(hints[f.name]), option_name(f)
            settings: dict[str, Any] = {"default": f.default, "help": f.metadata["help"], "cls": GroupedOption,
                                        "group": f.metadata["group"], "marked_required": f.default == ""}  # fmt: skip
            if f.default is not None and f.default != "":
                settings["show_default"] = True
            if kind is bool:
                command = click.option(f"{name}/--no-{name[2:]}", f.name, **settings)(command)
            else:
                command = click.option(name, f.name, type=kind, **settings)(command)
        return command

    return decorate


train_options = options_of(TrainOptions)


def parse_options(text: str, refused: Collection[str], where: str) -> dict[str, Any]:
    """`--locality-loss 0.02 --no-tensorboard` -> {"locality_loss": 0.02, "tensorboard": False}: what is said, no more.

    refused: fields that may not be set there. Raises UserError that begins with `where`.
    """
    command = click.Command("options", add_help_option=False)
    train_options(command)
    try:
        context = command.make_context("options", shlex.split(text))
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error
    except click.ClickException as error:
        raise UserError(f"{where}: {error.format_message()}") from error
    said = {
        name: value
        for name, value in context.params.items()
        if context.get_parameter_source(name) == ParameterSource.COMMANDLINE
    }
    for name in said:
        if name in refused:
            option = "--" + name.replace("_", "-")
            raise UserError(f"{where}: {option} holds for all recipes alike; give it beside --recipes")
    return said
