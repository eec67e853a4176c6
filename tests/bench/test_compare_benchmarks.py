"""Benchmarks over `luffy compare`: their cells are valid, budgets are kept, results are read as they should be."""

import importlib
import json
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"
sys.path.insert(0, str(BENCHMARKS))

import compare_tools  # noqa: E402
from run_all import NAMES  # noqa: E402

from luffy.train.entries import parse_entries  # noqa: E402
from luffy.train.option_parser import parse_options  # noqa: E402
from luffy.train.options import TrainOptions  # noqa: E402


def settings(tmp_path, device="cpu", small=True, budget=60.0, **changes):
    values = {"ranks": 4, "links": (None,), "steps": 20, "out": tmp_path, "more": ()} | changes
    return compare_tools.Settings(device=device, small=small, deadline=time.monotonic() + budget, **values)


def summary(label, seconds, loss):
    """What `luffy compare` says of a recipe, as far as benchmarks read it."""
    return {
        "label": label,
        "step_seconds": [0.9 * seconds, seconds, 1.1 * seconds],
        "phase_seconds": {"attention": 0.25 * seconds, "exchange": 0.5 * seconds, "gradients": 0.25 * seconds},
        "step_bytes": {"dispatch": 6e6, "gradients": 1e6, "control": 1e5},
        "speedup_over": {"vanilla": 2.0, "none": 3.0},
        "valid_loss": loss,
        "valid_loss_range": [loss, loss + 0.1],
        "tokens_per_second": 1000 / seconds,
        "copies_kept": 0.5,
        "network": None,
    }


def test_every_cell_is_a_comparison_that_could_run(tmp_path):
    seen = 0
    for name in NAMES:
        study = importlib.import_module(name).STUDY
        assert study.name == name and study.question
        for device in ("cpu", "cuda"):
            for small in (True, False):
                s = settings(tmp_path, device, small)
                for cell in study.cells(s):
                    command = compare_tools.command_of(cell, s)
                    at = command.index("--device")
                    words = [w for w in command[at:] if w not in ("--vary-seed", "--discard-checkpoints")]
                    shared = TrainOptions(**parse_options(" ".join(words), (), name))
                    shared.check_world(shared.ranks)
                    for entry in parse_entries(cell.recipes):
                        entry.apply(shared)
                        seen += 1
    assert seen > 150


@pytest.mark.parametrize("name", NAMES)
def test_results_become_a_table_and_a_figure(tmp_path, name):
    study = importlib.import_module(name).STUDY
    s = settings(tmp_path)
    cells = {
        cell.key: [summary(e.label, 0.2 + 0.1 * i, 3 + 0.1 * i) for i, e in enumerate(parse_entries(cell.recipes))]
        for cell in study.cells(s)
    }
    compare_tools.report(study, s, cells, complete=True)
    written = json.loads((tmp_path / f"{name}.json").read_text())
    assert written["provenance"] == "measured" and written["complete"] and written["hardware"]["device"] == "cpu"
    assert all(len(row) == len(written["table"]["head"]) for row in written["table"]["rows"])
    assert written["table"]["rows"] and (tmp_path / f"{name}.png").stat().st_size > 10_000
    if name == "paper_table1":  # three quarters of each step are exchange and waiting for gradients
        assert {cell for row in written["table"]["rows"] for cell in row[1:]} == {"75"}
    if name == "scaling_topk":
        assert written["table"]["rows"][0][-1] == "6.00"


FAKE = """
import json, pathlib, sys, time
out = pathlib.Path(sys.argv[sys.argv.index("--out") + 1])
out.mkdir(parents=True, exist_ok=True)
(out / "calls").open("a").write("x")
time.sleep(float(sys.argv[sys.argv.index("--lr") + 1]))
(out / "compare.json").write_text(json.dumps([{"label": "a", "network": None}]))
sys.exit(int(sys.argv[sys.argv.index("--seed") + 1]))
"""


def test_a_budget_is_kept_and_what_is_finished_stays(tmp_path, monkeypatch, capsys):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(compare_tools, "LUFFY", [sys.executable, str(tmp_path / "fake.py")])
    monkeypatch.setattr(compare_tools, "STOPPING_SECONDS", 0.0)
    cells = [compare_tools.Cell(str(i), "a,b", ["--lr", str(i), "--seed", "0"]) for i in (0, 30)]
    study = compare_tools.Study("x", "?", lambda s: cells, lambda c: (["a"], [["b"]]), lambda c: _figure())
    begin = time.monotonic()
    assert not compare_tools.run_study(study, settings(tmp_path, budget=4.0))
    assert time.monotonic() - begin < 20  # the second cell would have slept for 30 s
    assert "1 of 2 cells are finished; call again" in capsys.readouterr().err
    assert json.loads((tmp_path / "x.json").read_text())["complete"] is False
    cells[1] = compare_tools.Cell("1", "a,b", ["--lr", "0.1", "--seed", "0"])
    assert compare_tools.run_study(study, settings(tmp_path))
    first = next((tmp_path / "cells").glob("0-*"))
    assert (first / "calls").read_text() == "x"  # once, in the first call
    assert not compare_tools.run_study(
        compare_tools.Study("y", "?", lambda s: [compare_tools.Cell("9", "a,c", ["--lr", "0", "--seed", "0"])],
                            study.table, study.figure),
        settings(tmp_path, budget=-1.0),
    )  # fmt: skip


def test_a_comparison_that_fails_ends_the_benchmark_with_its_status(tmp_path, monkeypatch):
    (tmp_path / "fake.py").write_text(FAKE)
    monkeypatch.setattr(compare_tools, "LUFFY", [sys.executable, str(tmp_path / "fake.py")])
    cell = compare_tools.Cell("1", "a,b", ["--lr", "0", "--seed", "2"])
    for _ in range(2):  # and is not taken for finished
        with pytest.raises(SystemExit) as caught:
            compare_tools.run_cell(cell, settings(tmp_path))
        assert caught.value.code == 2


def test_links_come_from_the_command_line_or_the_question(tmp_path):
    sweep = importlib.import_module("bandwidth_sweep").STUDY
    other = importlib.import_module("paper_fig8").STUDY
    common = {"steps": None, "budget_seconds": 1.0, "ranks": 4, "out": tmp_path, "small": False, "more": ()}
    assert compare_tools.settings_of(sweep, device="cpu", link=None, **common).links == ("100mbit", "250mbit", "1gbit")
    s = compare_tools.settings_of(sweep, device="cuda", link="1gbit,2gbit", **common)
    assert [cell.link for cell in sweep.cells(s)] == ["1gbit", "2gbit"]
    command = compare_tools.command_of(sweep.cells(s)[1], s)
    assert command[3:9] == ["lab", "--ranks", "4", "--link", "2gbit", "--"] and "compare" in command
    assert compare_tools.settings_of(other, device="cpu", link=None, **common).links == (None,)


def _figure():
    from luffy.report.style import new_figure

    return new_figure()[0]


def test_all_peers_stand_in_every_cell_of_the_regimes(tmp_path, monkeypatch):
    regimes, seen = importlib.import_module("regimes"), []
    monkeypatch.setattr(regimes, "run_study", lambda study, s: seen.extend(study.cells(s)))
    peers = ["--also", str(tmp_path / "one"), "--also", str(tmp_path / "two")]
    arguments = ["--ranks", "4", "--link", "1gbit,2gbit", "--small", "--out", str(tmp_path / "out"), *peers]
    done = CliRunner().invoke(regimes.main, arguments)
    assert done.exit_code == 0, done.output
    assert [cell.extra for cell in seen] == [["--also", f"{tmp_path / 'one'},{tmp_path / 'two'}"]] * 2
