"""The comparison over several GPUs, in small on the CPU: one launch, entries in turn, what it says and keeps."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

import multigpu  # noqa: E402


def record(seconds, counted, exchange=0.0, num_bytes=8000):
    split = {"attention": 0.1, "exchange": exchange, "gradients": 0.01}
    return {"seconds": seconds, "counted": counted, "tokens": 10, "loss": 1.0, "bytes": {"dispatch": num_bytes},
            "seconds_split": split}  # fmt: skip


def test_counted_steps_give_medians_ratios_and_rooflines():
    base = [record(9.0, False), *(record(s, True, exchange=0.2) for s in (1.0, 2.0, 3.0, 4.0, 5.0))]
    auto = [record(9.0, False), *(record(s, True) for s in (4.0, 4.0, 4.0, 2.0, 2.0))]
    found = {"ranks": 2, "bytes_per_second": 1000.0, "entries": {"vanilla_dedup": base, "auto": auto}}
    dedup, chosen = multigpu.read("as joined", found)
    assert dedup["step_seconds"] == [2.0, 3.0, 4.0] and dedup["counted_steps"] == 5
    assert dedup["exposed_seconds"] == pytest.approx([0.21] * 3)
    assert dedup["wire_seconds"] == pytest.approx(4.0) == dedup["roofline_seconds"] and dedup["bound"] == "links"
    assert chosen["over_vanilla_dedup"] == pytest.approx(4 / 3)
    assert chosen["settled_over_vanilla_dedup"] == pytest.approx(2.0 / 4.5)


def test_an_entry_that_ends_a_launch_is_left_out_of_the_next(tmp_path, monkeypatch):
    target, asked = tmp_path / "way.json", []

    def launch(command: list[str], seconds: float) -> int:
        entries = command[command.index("--entries") + 1]
        asked.append(entries)
        if "luffy" not in entries:
            target.write_text(json.dumps({"complete": True, "failed": {}, "asked": [entries]}))
            return 0
        # One rank failed, the other waited for it until its time was over.
        (tmp_path / "way.notes").mkdir()
        (tmp_path / "way.notes" / "rank0.json").write_text(json.dumps({"label": "l", "why": "not over"}))
        (tmp_path / "way.notes" / "rank1.json").write_text(json.dumps({"label": "l", "why": "out of memory on a GPU"}))
        return 1

    monkeypatch.setattr(multigpu, "run_for", launch)
    multigpu.measure(
        "as joined", target, "vanilla;l=luffy --overlap;janus", 10, ["--device", "cpu"], 2, 60.0, 100.0, {}
    )
    assert asked == ["vanilla;l=luffy --overlap;janus", "vanilla;janus"]
    assert json.loads(target.read_text())["failed"] == {"l": "out of memory on a GPU"}
    multigpu.measure(
        "as joined", target, "vanilla;l=luffy --overlap;janus", 10, ["--device", "cpu"], 2, 60.0, 100.0, {}
    )
    assert len(asked) == 2, "what is complete is not measured again"


@pytest.mark.slow
def test_a_block_that_takes_too_long_ends_its_process_and_says_where(tmp_path):
    note = tmp_path / "rank0.json"
    code = f"""
import time
from pathlib import Path
from benchmarks.multigpu_ranks import bounded
with bounded("quick", 5.0, Path({str(note)!r})):
    pass
with bounded("slow", 0.2, Path({str(note)!r})):
    time.sleep(60)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50, env=environment)
    assert done.returncode == 3 and "line 8" in done.stderr
    assert json.loads(note.read_text())["label"] == "slow"


@pytest.mark.slow
def test_all_entries_share_a_launch_and_lossless_ones_a_loss(corpus, tmp_path):
    entries = "vanilla;vanilla_dedup;luffy;auto;luffy_max;janus;fastermoe;overlapped=vanilla_dedup --overlap;"
    command = [
        sys.executable, str(ROOT / "benchmarks" / "multigpu.py"), "--device", "cpu", "--small", "--ranks", "2",
        "--steps", "10", "--entries", f"{entries}odd=vanilla --experts 7", "--ways", "as joined",
        "--out", str(tmp_path), "--json", str(tmp_path / "result.json"),
        "--", "--data", corpus["data"], "--cache-dir", corpus["cache_dir"], "--vocab-size", "300",
    ]  # fmt: skip
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, done.stderr[-3000:]
    result = json.loads((tmp_path / "result.json").read_text())
    runs = {run["recipe"]: run for run in result["runs"]}
    lossless = ["vanilla", "vanilla_dedup", "luffy", "auto", "janus", "fastermoe"]
    assert set(runs) == {*lossless, "luffy_max", "overlapped"}
    assert [runs[name]["last_loss"] for name in lossless] == pytest.approx([runs["vanilla"]["last_loss"]] * 6, rel=1e-3)
    assert runs["luffy_max"]["bytes"] < runs["vanilla_dedup"]["bytes"] < runs["vanilla"]["bytes"]
    assert all(run["counted_steps"] == 4 for run in runs.values()) and runs["vanilla_dedup"]["over_vanilla_dedup"] == 1
    way = result["ways"]["as joined"]
    assert way["complete"] and way["bytes_per_second"] > 0 and "7" in way["failed"]["odd"]
    assert "odd left out" in done.stdout and "auto over vanilla_dedup, settled" in done.stdout
    again = subprocess.run(command, capture_output=True, text=True, timeout=100, env=environment)
    assert "already measured" in again.stderr and again.stdout == done.stdout
