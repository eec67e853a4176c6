"""Every command that README and docs show is one that the programs accept, options and values; test_run.py runs them.

A command goes as far as it can without hardware, root or a network: `luffy train` to the moment in which ranks would
start, torchrun through its own parser, `make` as a dry run. A program that nobody has taught this file fails.
"""

import re
import shlex
import subprocess
import tomllib
from pathlib import Path

import click
import pytest

from luffy.config import PRESETS
from luffy.hf.options import FinetuneOptions
from luffy.lab.cli import lab
from luffy.lab.spec import read_spec
from luffy.train.cli import cli, main
from luffy.train.run import start
from tests.docs.commands import GUIDES, RESEARCH, ROOT, SHELL, Shown, blocks, fences, own_script, shown, spans

IN_GUIDES = list(shown(GUIDES))
# Of other programs, in prose.
FOREIGN = {"--check", "--index-url", "--ipc", "--network", "--no-build-isolation", "--no-deps", "--nproc-per-node",
           "--plain", "--privileged", "--signal", "--standalone"}  # fmt: skip


class LaunchedError(Exception):
    """Everything that can be checked has been: ranks would start now."""


@pytest.fixture
def no_launch(monkeypatch) -> None:
    def launch(*arguments: object) -> None:
        raise LaunchedError

    monkeypatch.setattr("luffy.train.run.launch", launch)
    # The folder of weights is read where commands are run; transformers takes seconds to load.
    monkeypatch.setattr(FinetuneOptions, "model_config", lambda self: PRESETS["moe-gpt2-tiny"])


def name_of(command: Shown) -> str:
    return f"{command.page}: {str(command)[:60]}"


def accept(words: tuple[str, ...], desk, abridged: bool = False) -> None:
    """Raises, or exits with status 2, for anything that `luffy` would not take."""
    name = words[0]
    if name == "lab":
        settings = lab.make_context("lab", list(words[1:])).params
        command = settings.pop("command")
        settings.pop("per_rank")
        read_spec(**settings)
        assert command[0] in ("luffy", "python"), command
        if command[0] == "luffy":
            accept(command[1:], desk, abridged)
        return
    arguments = desk.fill(words, abridged)
    context = cli.commands[name].make_context(name, arguments[1:])
    if name in ("train", "compare"):
        with pytest.raises(LaunchedError):
            main(arguments)
    elif name == "finetune":  # without its trainer, whose modules take seconds to load
        with pytest.raises(LaunchedError):
            start(FinetuneOptions(**context.params))
    elif name == "plan":
        main(arguments)


def check_pip(words: tuple[str, ...]) -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]
    for what in (w for w in words if not w.startswith("-")):
        name, _, extra = what.removesuffix("]").partition("[")
        if name.startswith("torch=="):
            assert f"TORCH ?= {name}\n" in (ROOT / "Makefile").read_text("utf-8")
            continue
        assert name in (".", "/luffy", project["name"]), what
        assert not extra or extra in project["optional-dependencies"], what


def check_script(words: tuple[str, ...]) -> None:
    """A Python file and its options."""
    source = own_script() if words[0] == "own.py" else (ROOT / words[0]).read_text("utf-8")
    compile(source, words[0], "exec")
    for option in (w for w in words if w.startswith("--")):
        assert f'"{option}"' in source, f"{words[0]} has no {option}"


def check(command: Shown, desk) -> None:
    program, rest = command.program, command.words[1:]
    if program == "make":
        dry = subprocess.run(["make", "-n", *rest], cwd=ROOT, capture_output=True, text=True)
        assert dry.returncode == 0, dry.stderr
    elif program == "python":
        check_script(rest)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        known = [desk.given.get(w, w) for w in rest if w != "$@"]
        parsed = get_args_parser().parse_args(known)
        if not parsed.module:
            check_script((parsed.training_script, *parsed.training_script_args))
    elif program == "pip":
        assert rest[0] == "install"
        check_pip(rest[1:])
    elif program == "docker":
        assert rest[0] in ("build", "run")
    else:
        assert program in ("luffy", "srun", "set", ":", ".", "export"), f"{command}: teach this file to check {program}"
    if command.luffy:
        accept(command.luffy, desk, command.abridged)


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_the_commands_of_a_guide_are_accepted(page: Path, desk, runs, no_launch, capsys) -> None:
    for command in (c for c in IN_GUIDES if c.page == page.name):
        try:
            check(command, desk)
        except (SystemExit, AssertionError, click.ClickException) as error:
            pytest.fail(f"{page.name}: {command}\n{error}\n{capsys.readouterr().err}")


@pytest.mark.parametrize(
    "command",
    ["luffy train --recipe nothing", "luffy train --sequnce-length 8", "luffy lab --ranks 2 --link 3 -- luffy train",
     "luffy train --ranks 16 --ep-size 3", "luffy compare --recipes 'vanilla;luffy --wire int5'", "frobnicate",
     "torchrun --nprocs 2 own.py", "make nothing", "pip install luffy-moe[none]", "python examples/none.py"],
)  # fmt: skip
def test_a_wrong_command_is_found(command: str, desk, no_launch, monkeypatch) -> None:
    with pytest.raises((SystemExit, AssertionError, click.ClickException, Exception)) as found:
        check(Shown("page", tuple(shlex.split(command))), desk)
    assert not isinstance(found.value, LaunchedError)


def test_blocks_are_of_a_language_that_is_looked_at() -> None:
    for page in GUIDES:
        for language, content in fences(page):
            assert language in (*SHELL, "python", "dockerfile", "text", "json"), f"{page.name}: a block of {language!r}"
            assert language != "text" or not re.search(r"^(luffy|make|python|torchrun) ", content, re.MULTILINE)
            if language == "dockerfile":
                for words in re.findall(r"pip install (.*?)(?:$| &&)", content, re.MULTILINE):
                    check_pip(tuple(shlex.split(words)))
        for block in blocks(page):
            assert subprocess.run(["bash", "-n"], input=block.replace("...", ""), text=True).returncode == 0


@pytest.mark.parametrize("command", [c for c in shown(RESEARCH) if c.luffy], ids=name_of)
def test_options_of_research_pages_are_known(command: Shown) -> None:
    words = command.luffy or ()
    if words[0] == "lab":
        inner = lab.make_context("lab", list(words[1:])).params["command"]
        words = inner[1:] if inner[0] == "luffy" else ()
    if words:
        cli.commands[words[0]].make_context(words[0], list(words[1:]), resilient_parsing=command.abridged)


def test_scripts_of_research_pages_are_there() -> None:
    for command in shown(RESEARCH):
        for program, target in zip(command.words, command.words[1:], strict=False):
            if Path(program).name == "python" and target.endswith(".py"):
                assert (ROOT / target).exists(), f"{command.page}: {target}"
            if program == "make":
                assert f"\n{target}:" in (ROOT / "Makefile").read_text("utf-8"), f"{command.page}: make {target}"


def options_of(command: click.Command) -> set[str]:
    return {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help", "--version"}


@pytest.mark.parametrize("page", [*GUIDES, *RESEARCH], ids=lambda page: page.name)
def test_options_in_prose_exist(page: Path) -> None:
    files = [*(ROOT / "benchmarks").rglob("*.py"), *(ROOT / "examples").glob("*.py"), *(ROOT / "tests").rglob("*.py")]
    ours = set().union(*(options_of(c) for c in cli.commands.values()))
    scripts = set(re.findall(r"\"(--[a-z][a-z-]+)\"", "".join(f.read_text("utf-8") for f in files)))
    for span in spans(page):
        words = span.split()
        if re.match(r"--(training|override|parallelism|compile)\.", span):  # torchtitan's own, in sections
            continue
        found = set(re.findall(r"(?<![\w-])--[a-z][a-z-]+", span))
        unknown = found - ours - scripts - FOREIGN
        if words[0] == "luffy" and len(words) > 1 and words[1] not in ("X", "--help", "--help-all"):
            assert words[1] in cli.commands, f"{page.name}: `{span}`"
            unknown |= {o for o in found - FOREIGN if words[1] != "lab" and o not in options_of(cli.commands[words[1]])}
        assert not unknown, f"{page.name}: `{span}` has {sorted(unknown)}, which no command takes"
