"""The public interface is what public_interface.txt says: names, parameters, defaults, commands, options.

What changes it on purpose changes the file too: `python -m tests.test_public`, and a line in CHANGELOG.md.
docs/stability.md says what users may rely on.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import click
import pytest

import luffy
import luffy.hf
from luffy.train.cli import cli

PLAIN = (str, int, float, tuple, type(None))  # defaults that read the same everywhere; others are "..."
FILE = Path(__file__).with_name("public_interface.txt")


def parameters(thing: Any) -> str:
    """(a, b=1, *, c) without types, which typing spells in many ways."""
    found = inspect.signature(thing).parameters.values()
    bare = [
        p.replace(
            annotation=p.empty, default=p.default if isinstance(p.default, PLAIN) or p.default is p.empty else ...
        )
        for p in found
        if p.name not in ("self", "cls")
    ]
    return str(inspect.Signature(bare))


def described(name: str, thing: Any) -> Iterator[str]:
    if inspect.isclass(thing):
        yield f"{name}{parameters(thing)}"
        for method, value in sorted(vars(thing).items()):
            if method.startswith("_"):
                continue
            if isinstance(value, property):
                yield f"{name}.{method}"
            elif callable(value) or isinstance(value, classmethod | staticmethod):
                yield f"{name}.{method}{parameters(getattr(thing, method))}"
    elif callable(thing):
        yield f"{name}{parameters(thing)}"
    else:
        yield f"{name}: {type(thing).__name__}"


def of_module(module: ModuleType) -> Iterator[str]:
    for name in module.__all__:
        yield from described(f"{module.__name__}.{name}", getattr(module, name))


def of_command_line() -> Iterator[str]:
    for name, command in sorted(cli.commands.items()):
        context = click.Context(command)
        yield f"luffy {name}"
        for parameter in command.get_params(context):
            longest = [word for word in parameter.opts if word.startswith("--")] or [f"[{parameter.name}]"]
            yield f"luffy {name} {longest[0]}"


def interface() -> str:
    pytest.importorskip("transformers")
    lines = sorted({*of_module(luffy), *of_module(luffy.hf), *of_command_line()})
    return "\n".join(lines) + "\n"


def test_the_public_interface_changes_on_purpose_only() -> None:
    found, written = interface().splitlines(), FILE.read_text("utf-8").splitlines()
    new, gone = sorted(set(found) - set(written)), sorted(set(written) - set(found))
    assert not new and not gone, f"new: {new}; gone: {gone}. On purpose? python -m tests.test_public"


def test_a_type_checker_is_told_every_name() -> None:
    for package in (luffy, luffy.hf):
        source = Path(str(package.__file__)).read_text("utf-8")
        told = source.split("if TYPE_CHECKING:")[1].split("\n_HOMES")[0]
        for name in package.__all__:
            assert name in told or name == "__version__", f"{package.__name__}.{name}"
    assert Path(str(luffy.__file__)).with_name("py.typed").exists()


if __name__ == "__main__":
    FILE.write_text(interface(), encoding="utf-8")
