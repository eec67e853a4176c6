"""Labs for tests, and a loud word where this machine allows none."""

from __future__ import annotations

import collections
import functools
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from luffy.errors import UserError
from luffy.lab.namespace import missing_capabilities
from luffy.lab.network import Network
from luffy.lab.spec import LabSpec, read_spec

LUFFY = [sys.executable, "-m", "luffy.train.cli"]


@functools.cache
def why_no_lab() -> str | None:
    """Why this machine cannot have a lab; None if it can."""
    missing = missing_capabilities()
    if missing:
        return f"needs root ({', '.join(missing)})"
    try:
        Network(LabSpec(ranks=2, link=1e7)).close()
    except UserError as error:
        return str(error)
    return None


@pytest.fixture
def needs_lab() -> None:
    """For tests that make real networks."""
    reason = why_no_lab()
    if reason:
        pytest.skip(f"no lab on this machine: {reason}")


def pytest_terminal_summary(terminalreporter: Any) -> None:
    reports = [r for r in terminalreporter.stats.get("skipped", []) if "tests/lab/" in r.nodeid]
    reasons = collections.Counter(str(r.longrepr[2]).removeprefix("Skipped: ") for r in reports)
    if reasons:
        terminalreporter.section("tests of luffy lab that did NOT run")
    for reason, count in reasons.items():
        terminalreporter.line(f"{count} x {reason}")


@pytest.fixture
def network(needs_lab: None) -> Iterator[Callable[..., Network]]:
    """Make networks by the options of `luffy lab`; all are closed at the end."""
    made: list[Network] = []

    def make(**options: Any) -> Network:
        made.append(Network(read_spec(**options)))
        return made[-1]

    yield make
    for each in made:
        each.close()


@pytest.fixture
def start_lab(needs_lab: None) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Start `luffy lab` with these arguments; what still runs at the end is stopped."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        command = [*LUFFY, "lab", *arguments]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
        )
        started.append(process)
        return process

    yield start
    for process in started:
        if process.poll() is None:
            process.terminate()
        process.communicate(timeout=60)


@pytest.fixture
def tiny(corpus: dict[str, str], tmp_path: Path) -> list[str]:
    """Options of a training of a few steps that takes seconds."""
    settings = {
        "data": corpus["data"], "cache-dir": corpus["cache_dir"], "out": tmp_path / "run", "device": "cpu",
        "vocab-size": 300, "layers": 2, "hidden-size": 32, "heads": 2, "experts": 4, "expert-hidden-size": 32,
        "sequence-length": 32, "batch-size": 8, "eval-every": 0, "eval-batches": 1, "checkpoint-every": 0,
    }  # fmt: skip
    return ["--no-tensorboard", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]
