"""Runs side by side, and runs that must not stand side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.peers.table import collect, markdown, write
from luffy.errors import UserError
from luffy.report.runs import BYTE_KINDS


def make_run(folder: Path, recipe: str, dispatch: int, **changes: Any) -> Path:
    folder.mkdir()
    records = []
    for step in (1, 2):
        num_bytes = dict.fromkeys(BYTE_KINDS, 0) | {"dispatch": dispatch * step, "combine": 1000, "gradients": 500_000}
        record = {"step": step, "loss": 8.5 / step, "tokens": 10, "seconds": 0.25 * step, "bytes": num_bytes}
        records.append(json.dumps(record))
    (folder / "metrics.jsonl").write_text("\n".join(records) + "\n")
    summary = {"recipe": recipe, "model": "m", "world_size": 4, "seed": 0, "dtype": "float32", "valid_loss": 4.0,
               "peak_memory_bytes": 2e9, "tokens_per_second": 26.7}  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary | changes))
    return folder


def test_a_table_of_two_runs(tmp_path: Path) -> None:
    runs = [make_run(tmp_path / "a", "vanilla", 2_000_000), make_run(tmp_path / "b", "hf_ep", 4_000_000)]
    rows = collect(runs)
    lines = markdown(rows).splitlines()
    assert lines[2] == "| vanilla | 2.001 | 3.001 | 0.500 | 0.000 | 0.000 | 8.5000 | 4.0000 |"
    assert lines[3].startswith("| hf_ep | 4.001 | 6.001 |")
    assert "step_seconds_median" not in rows[0], "times are only shown where they are asked for"
    timed = collect(runs, times=True)
    assert timed[0]["step_seconds_median"] == 0.375
    assert markdown(timed).splitlines()[2].endswith("| 0.375 | 27 | 2.00 |")
    write(rows, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())[1]["bytes_per_step"]["dispatch"] == 6_000_000


@pytest.mark.parametrize("changes", [{"world_size": 2}, {"model": "n"}, {"seed": 1}, {"dtype": "bfloat16"}])
def test_unlike_runs_are_refused(tmp_path: Path, changes: dict[str, Any]) -> None:
    runs = [make_run(tmp_path / "a", "vanilla", 1), make_run(tmp_path / "b", "hf_ep", 1, **changes)]
    with pytest.raises(UserError, match="run both alike"):
        collect(runs)
