"""Benchmarks that train one model many times: trainings spread over GPUs, recorded files can be continued."""

import json
import sys
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import trainings  # noqa: E402
import wire_quality  # noqa: E402

from luffy.compose import check  # noqa: E402
from luffy.config import model_preset  # noqa: E402
from luffy.recipes import get_recipe  # noqa: E402


def test_trainings_are_spread_over_the_gpus_there_are(monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,7")
    seen = []

    def do(variables):
        seen.append(variables["CUDA_VISIBLE_DEVICES"])
        return "done"

    trainings.side_by_side([(f"n{i}", do) for i in range(8)], jobs=1, gpus=1, seconds=60)
    assert Counter(seen) == {"4": 8}
    seen.clear()
    trainings.side_by_side([(f"n{i}", do) for i in range(8)], jobs=2, gpus=2, seconds=60)
    assert set(seen) <= {"4", "7"} and len(seen) == 8
    trainings.side_by_side([("late", do)], jobs=2, gpus=0, seconds=-1)
    out = capsys.readouterr().out
    assert "n7: done" in out and "late: no time left" in out
    with pytest.raises(Exception, match="shows 2"):
        trainings.side_by_side([("n", do)], jobs=1, gpus=3, seconds=60)


def test_a_failed_training_says_why():
    assert trainings.failure([sys.executable, "-c", ""], {}) is None
    said = trainings.failure([sys.executable, "-c", "import os, sys; sys.exit(os.environ['WHY'])"], {"WHY": "no disk"})
    assert said == "no disk"
    words = "import sys; sys.exit('Traceback\\nValueError: too few\\nChildFailedError: pages about the launcher')"
    assert trainings.failure([sys.executable, "-c", words], {}) == "ValueError: too few"


def test_every_wire_scheme_can_train():
    for name, (wire, condense) in (wire_quality.SCHEMES | wire_quality.MORE).items():
        recipe = wire_quality.MOVES if wire_quality.moves(name) else get_recipe("vanilla")
        check(replace(recipe, wire=wire, condense=condense), model_preset("moe-gpt2"))


def test_the_recorded_wire_runs_can_be_continued():
    recorded = json.loads((ROOT / "docs" / "results" / "wire_quality.json").read_text())
    settings = {"model": wire_quality.MODEL, "steps": 1000, "batch_size": 16, "sequence_length": 512, "lr": 1e-3}
    assert recorded["settings"] == settings
    known = wire_quality.SCHEMES | wire_quality.MORE
    runs = [run for run in recorded["runs"] if run["scheme"] in known]  # others are of formats that were given up
    assert {run["scheme"] for run in runs} >= set(wire_quality.SCHEMES)
    for run in runs:
        assert (run["wire"], run["condense"]) == known[run["scheme"]]


def run(scheme, seed, loss, row_bytes, corpus="texts (12 bytes)"):
    content = {"scheme": scheme, "seed": seed, "corpus": corpus, "valid_loss": loss}
    return content | {"kept": 1.0, "row_bytes": row_bytes}


def test_moving_schemes_are_compared_with_moves_of_their_seed():
    runs_of = {
        "moves": [run("moves", 0, 4.0, 100), run("moves", 1, 4.2, 200)],
        "moves int8": [run("moves int8", 1, 4.3, 90), run("moves int8", 2, 9.9, 90)],
    }
    moved = {wire_quality.pair_of(r): r for r in runs_of["moves"]}
    assert wire_quality.gaps_to(moved, runs_of["moves int8"]) == [pytest.approx(0.1)]
    assert wire_quality.gaps_to(moved, runs_of["moves"]) == []
    shares = [wire_quality.byte_share(r, runs_of) for r in runs_of["moves int8"]]
    assert shares == [0.45, None]
    assert wire_quality.byte_share(run("int8", 0, 4.0, 0), {}) == pytest.approx(8.5 / 16)


def test_runs_are_compared_within_a_corpus_and_a_seed():
    runs_of = {
        "none": [run("none", 0, 4.0, 0)],
        "bf16": [run("bf16", 0, 4.1, 0), run("bf16", 0, 5.0, 0, corpus="others (13 bytes)")],
        "int8": [run("int8", 0, 4.2, 0), run("int8", 0, 5.5, 0, corpus="others (13 bytes)"), run("int8", 1, 9.0, 0)],
    }
    base = wire_quality.bases(runs_of)
    assert wire_quality.gaps_to(base, runs_of["int8"]) == pytest.approx([0.2, 0.5])
    assert wire_quality.gaps_to(base, runs_of["bf16"]) == pytest.approx([0.1])
    assert wire_quality.gaps_to(base, runs_of["none"]) == []


def test_a_corpus_is_known_by_its_files(tmp_path):
    (tmp_path / "a.jsonl").write_text("{}")
    one = trainings.fingerprint(str(tmp_path))
    assert one == trainings.fingerprint(str(tmp_path / "a.jsonl")) == "a.jsonl (2 bytes)"
    (tmp_path / "valid.jsonl").write_text("{}")
    assert trainings.fingerprint(str(tmp_path)) != one and trainings.fingerprint("stdlib") == "stdlib"
