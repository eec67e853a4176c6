"""What the site is made of beside docs/: its first page is README.md, and one page is the command line's own help."""

from __future__ import annotations

import importlib
import os
import re
import sys
from pathlib import Path
from typing import Any

import click
from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(!?)\[([^\]]*)\]\(([^)#:\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: Any) -> Files:
    """Add index.md and cli.md."""
    readme = re.sub(r"\]\(docs/", "](", (ROOT / "README.md").read_text("utf-8"))
    files.append(File.generated(config, "index.md", content=readme))
    files.append(File.generated(config, "cli.md", content=command_line()))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Links to files of the repository that are not on the site become their names."""
    folder = (ROOT / "docs" / page.file.src_uri).parent
    if page.file.src_uri == "index.md":
        folder = ROOT / "docs"

    def shown(match: re.Match[str]) -> str:
        target = Path(os.path.normpath(folder / match[3]))
        outside = ROOT / "docs" not in target.parents
        return f"`{match[2]}`" if outside or match[3] == "CONTRIBUTING.md" else match[0]

    return _LINK.sub(shown, markdown)


def command_line() -> str:
    """The help of every command, all options."""
    sys.path.insert(0, str(ROOT))
    cli = importlib.import_module("luffy.train.cli").cli
    more = importlib.import_module("luffy.train.commands").MORE
    parts = ["# Command line\n\nA mistake is one line that names the option, and exit status 2."]
    for name, command in cli.commands.items():
        context = click.Context(
            command, info_name=name, parent=click.Context(cli, info_name="luffy"), max_content_width=76
        )
        context.terminal_width = 76
        context.meta[more] = True
        parts.append(f"## luffy {name}\n\n```text\n{command.get_help(context)}\n```")
    return "\n\n".join(parts) + "\n"
