"""Benchmarks of `auto`: whom it is judged by, and where its duels come to rest."""

import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import auto_beside_fixed  # noqa: E402
import prediction  # noqa: E402


def test_auto_is_judged_by_the_best_fixed_recipe_and_by_counted_steps():
    def records(*seconds):
        return [{"seconds": s, "counted": i > 0} for i, s in enumerate(seconds)]

    entries = {name: records(9.0, 3.0, 3.0, 3.0, 3.0, 3.0) for name in auto_beside_fixed.FIXED}
    entries["janus"] = records(9.0, 2.0, 2.0, 2.0, 2.0, 2.0)
    entries["auto"] = records(9.0, 3.0, 4.0, 2.5, 2.1, 2.3)
    entries["auto"][2]["auto"] = {"mode": "vanilla_dedup", "chosen": "janus"}
    cell = auto_beside_fixed.read_cell({"entries": entries, "bytes_per_second": 1e6, "environment": {}})
    assert cell["best_fixed"] == {"settled": "janus", "whole run": "janus"}
    assert cell["settled_over_best"] == pytest.approx(2.2 / 2.0)
    assert cell["whole_run_over_best"] == pytest.approx(13.9 / 10.0)
    assert cell["auto"] == [{"step": 3, "mode": "vanilla_dedup", "chosen": "janus"}]
    assert "**2.000**" in auto_beside_fixed.markdown({"2:1gbit:4": cell}, 6)


def test_duels_end_where_nothing_promises_more():
    def mode(predicted, measured):
        return {"predicted": predicted, "measured": measured, "all": [measured] * 8}

    overrated = {"vanilla_dedup": mode(1.0, 1.0), "janus": mode(0.5, 1.5), "fastermoe": mode(0.8, 0.9)}
    assert prediction.settle(overrated) == "fastermoe"
    assert prediction.settle(overrated | {"fastermoe": mode(0.99, 0.9)}) == "vanilla_dedup", "promises too little"
    assert prediction.settle({"vanilla_dedup": mode(1.0, 1.0), "janus": mode(0.5, 1.5)}) == "vanilla_dedup"
