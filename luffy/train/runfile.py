"""Run files: the options of a run in TOML, as `--out` keeps them and `luffy train run.toml` reads them.

    recipe = "luffy"
    batch_size = 64
    tensorboard = false

Names are those of the options, with underscores or dashes. A run's own file (OUT/run.toml) holds what differs from the
defaults, and the rest as comments.
"""

from __future__ import annotations

import difflib
import json
import tomllib
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import click

from luffy.errors import UserError

RUN_FILE = "run.toml"
_NOT_OF_A_RUN = ("resume", "overwrite")  # but of one call of it
_KINDS: dict[str, tuple[type, ...]] = {"integer": (int,), "float": (int, float), "text": (str,), "boolean": (bool,)}


def read_run_file(path: str, options: Sequence[click.Option]) -> dict[str, Any]:
    """Values by parameter name. UserError, one line, for a file, a name or a kind of value that cannot be."""
    if not path.endswith(".toml"):
        raise UserError(f"{path} is no run file: its name must end in .toml (options begin with --)")
    try:
        content = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; name a run file, such as OUT/{RUN_FILE}") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not TOML ({error})") from error
    known = {o.name: o for o in options if o.name is not None and o.expose_value}
    values = {}
    for key, value in content.items():
        name = key.replace("-", "_")
        if name not in known:
            near = difflib.get_close_matches(name, [n for n in known if n], 1)
            raise UserError(f"{path}: no option {key}" + (f"; did you mean {near[0]}?" if near else ""))
        kind = known[name].type.name
        allowed = _KINDS.get(kind, (str,))
        if not isinstance(value, allowed) or (isinstance(value, bool) and bool not in allowed):
            raise UserError(f"{path}: {key} = {json.dumps(value, default=str)} is not of the kind {kind}")
        values[name] = value
    return values


def write_run_file(options: Any) -> None:
    """Write OUT/run.toml of an options object. UserError where it cannot be written."""
    lines = ["# The options of this run; comments are as they would be anyway. Those without a value are left out."]
    group = ""
    for f in fields(options):
        value = getattr(options, f.name)
        if f.name in _NOT_OF_A_RUN or value is None:
            continue
        if f.metadata["group"] != group:
            group = f.metadata["group"]
            lines += ["", f"# {group}"]
        # Texts, numbers and booleans of JSON are those of TOML.
        lines.append(f"{'# ' if value == f.default else ''}{f.name} = {json.dumps(value, ensure_ascii=False)}")
    path = Path(options.out, RUN_FILE)
    try:
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--out {path}: {error.strerror}") from error
