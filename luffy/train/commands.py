"""Commands with many options: those that matter most come first, `--help-all` shows the rest by group.

Such a command also takes a run file: `luffy train run.toml` (runfile.py); what the command line says goes before it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from luffy.train.runfile import read_run_file

MORE = "more"


class GroupedOption(click.Option):
    """An option with a group of the help page. required: says so there; its absence is found with all that is wrong."""

    def __init__(self, *arguments: Any, group: str = "", marked_required: bool = False, **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.group, self.marked_required = group, marked_required

    def get_help_record(self, ctx: click.Context) -> tuple[str, str] | None:
        record = super().get_help_record(ctx)
        if record is not None and self.marked_required:
            return record[0], f"{record[1]}  [required]"
        return record


class RunCommand(click.Command):
    """A command of grouped options. first: the fields whose options come first."""

    def __init__(self, *arguments: Any, first: Sequence[str] = (), **settings: Any) -> None:
        super().__init__(*arguments, **settings)
        self.first = tuple(first)
        self.params.insert(0, click.Argument(["run_file"], required=False, metavar="[RUN.toml]", expose_value=False,
                                             is_eager=True, callback=self._read))  # fmt: skip
        self.params.append(click.Option(["--help-all"], is_flag=True, is_eager=True, expose_value=False,
                                        callback=self._help_all, help="Show every option, and leave."))  # fmt: skip

    def _read(self, ctx: click.Context, _: click.Parameter, path: str | None) -> None:
        if path is not None and not ctx.resilient_parsing:
            ctx.default_map = {**read_run_file(path, [p for p in self.params if isinstance(p, click.Option)])}

    def _help_all(self, ctx: click.Context, _: click.Parameter, wanted: bool) -> None:
        if wanted and not ctx.resilient_parsing:
            ctx.meta[MORE] = True
            click.echo(ctx.get_help())
            ctx.exit()

    def format_options(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        grouped = [p for p in self.get_params(ctx) if isinstance(p, GroupedOption)]
        own = [p for p in self.get_params(ctx) if not isinstance(p, GroupedOption | click.Argument)]
        sections: dict[str, list[click.Parameter]] = {}
        if own[:-2]:  # but --help-all and --help
            sections[f"Options of {ctx.info_name}"] = own[:-2]
        often = sorted((p for p in grouped if p.name in self.first), key=lambda p: self.first.index(p.name or ""))
        sections["Options"] = [*often, *own[-2:]]
        if ctx.meta.get(MORE):
            for p in grouped:
                if p not in often:
                    sections.setdefault(p.group, []).append(p)
        for title, params in sections.items():
            with formatter.section(title):
                formatter.write_dl([r for p in params if (r := p.get_help_record(ctx)) is not None])
        if not ctx.meta.get(MORE):
            formatter.write_paragraph()
            formatter.write_text(f"{len(grouped) - len(often)} more options: {ctx.command_path} --help-all")
