"""Ranks that share a GPU: the service that lets them is started, named to the command, and gone afterwards."""

from __future__ import annotations

import os
import stat
import time
from pathlib import Path

import pytest

from luffy.lab import gpus

# Stands in for the real program: makes its pipe, waits in the foreground, and ends when it is asked to.
STAND_IN = """#!/bin/sh
if [ "$1" != -f ]; then read word rest; touch "$CUDA_MPS_PIPE_DIRECTORY/$word"; exit 0; fi
echo "$$ devices=$CUDA_VISIBLE_DEVICES name=$LAB_NAME" > {notes}
{at_start}
touch "$CUDA_MPS_PIPE_DIRECTORY/control"
while [ ! -e "$CUDA_MPS_PIPE_DIRECTORY/quit" ]; do sleep 0.05; done
"""


@pytest.fixture
def program(tmp_path, monkeypatch):
    """Put the stand-in on the path; the file where it notes how it was started."""

    def install(at_start: str = "") -> Path:
        notes, path = tmp_path / "notes", tmp_path / "bin" / gpus.PROGRAM
        path.parent.mkdir()
        path.write_text(STAND_IN.format(notes=notes, at_start=at_start))
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
        return notes

    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    return install


def test_the_service_runs_while_ranks_share_and_not_longer(program, monkeypatch):
    notes = program()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    with gpus.sharing(8, 1, {**os.environ, "LAB_NAME": "mine"}) as (how, variables):
        pid, devices, name = notes.read_text().split()
        assert how == gpus.SIDE_BY_SIDE
        assert Path(variables["CUDA_MPS_PIPE_DIRECTORY"], "control").exists()
        assert Path("/proc", pid).exists()
        assert devices == "devices=", "it serves all GPUs, whichever of them the command is shown"
        assert name == "name=mine", "by which a lab after a kill -9 finds what to end"
    assert not Path("/proc", pid).exists()
    assert not Path(variables["CUDA_MPS_PIPE_DIRECTORY"]).exists()


@pytest.mark.parametrize(("ranks", "count"), [(4, 0), (2, 2), (2, 4)])
def test_nothing_is_started_where_nothing_is_shared(program, ranks, count):
    notes = program()
    with gpus.sharing(ranks, count, dict(os.environ)) as (how, variables):
        assert (how, variables) == (None, {})
    assert not notes.exists()


def test_a_service_that_does_not_start_leaves_turns_and_says_so(program):
    program("exit 1")
    begin = time.monotonic()
    with gpus.sharing(8, 1, dict(os.environ)) as (how, variables):
        assert (how, variables) == (gpus.IN_TURNS, {})
    assert time.monotonic() - begin < gpus.START_SECONDS
    assert gpus.PROGRAM in gpus.describe(how, 8, 1)


def test_without_the_program_ranks_take_turns(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    with gpus.sharing(8, 2, dict(os.environ)) as (how, variables):
        assert (how, variables) == (gpus.IN_TURNS, {})


def test_a_service_of_the_users_own_is_left_alone(program, monkeypatch):
    notes = program()
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", "/somewhere")
    with gpus.sharing(8, 1, dict(os.environ)) as (how, variables):
        assert (how, variables) == (gpus.SIDE_BY_SIDE, {})
    assert not notes.exists()


def test_gpus_that_are_hidden_do_not_count(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert gpus.count_gpus() == 0
