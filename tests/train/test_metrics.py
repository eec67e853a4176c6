"""The record of a run survives kills, resumes, full disks and numbers that JSON does not know."""

import io
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from rich.console import Console

from luffy.errors import UserError
from luffy.report.units import (
    format_bytes,
    format_count,
    format_rate,
    format_seconds,
    format_share,
)
from luffy.train.metrics import (
    BYTE_KINDS,
    MetricsWriter,
    RunSummary,
    describe_machine,
    flatten_scalars,
    read_metrics,
    write_json_atomic,
)
from luffy.train.progress import TrainProgress, phase


def record(step: int, **extra: Any) -> dict[str, Any]:
    traffic = {kind: 100 * step + i for i, kind in enumerate(BYTE_KINDS)}
    return {"step": step, "loss": 5.0 / step, "tokens": 1000, "seconds": 0.5, "bytes": traffic} | extra


def write_steps(out: Path, steps: range, resume: int | None = None) -> None:
    with MetricsWriter(out, resume, tensorboard=False) as writer:
        for step in steps:
            writer.write(record(step))


# ---------------------------------------------------------------- metrics.jsonl


def test_every_step_is_on_disk_before_the_writer_closes(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        for step in (1, 2, 3):
            writer.write(record(step))
            assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, step + 1))


def test_a_resumed_record_equals_an_unbroken_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "whole", range(1, 11))
    write_steps(tmp_path / "broken", range(1, 9))
    write_steps(tmp_path / "broken", range(6, 11), resume=5)
    whole, broken = (tmp_path / name / "metrics.jsonl" for name in ("whole", "broken"))
    assert broken.read_bytes() == whole.read_bytes()
    assert not list((tmp_path / "broken").glob("*.tmp"))


@pytest.mark.parametrize("cut", [1, 7, 40, 100])
def test_a_line_torn_by_a_kill_is_left_out_and_repaired(tmp_path: Path, cut: int) -> None:
    write_steps(tmp_path, range(1, 5))
    path = tmp_path / "metrics.jsonl"
    content = path.read_bytes()
    path.write_bytes(content[:-cut])
    # Without its newline alone, the last line is still whole.
    last = 4 if cut == 1 else 3
    assert [r["step"] for r in read_metrics(path)] == list(range(1, last + 1))
    write_steps(tmp_path, range(4, 5), resume=3)
    assert path.read_bytes() == content


def test_zeros_that_a_power_cut_leaves_are_ignored(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 3))
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(path.read_bytes() + b"\0" * 64)
    assert len(read_metrics(path)) == 2


def test_a_resume_at_the_last_step_changes_nothing(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    before = (tmp_path / "metrics.jsonl").stat().st_ino
    write_steps(tmp_path, range(0), resume=3)
    assert (tmp_path / "metrics.jsonl").stat().st_ino == before


def test_a_resume_without_a_record_starts_one(tmp_path: Path) -> None:
    write_steps(tmp_path / "new", range(4, 6), resume=3)
    assert [r["step"] for r in read_metrics(tmp_path / "new" / "metrics.jsonl")] == [4, 5]


def test_a_new_run_replaces_record_and_summary(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 9))
    write_json_atomic(tmp_path / "summary.json", {"recipe": "old"})
    write_steps(tmp_path, range(1, 3))
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == [1, 2]
    assert not (tmp_path / "summary.json").exists()


def test_damage_before_the_last_line_is_named(tmp_path: Path) -> None:
    write_steps(tmp_path, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_text().splitlines()
    path.write_text("\n".join([lines[0], lines[1][:20], lines[2]]) + "\n")
    with pytest.raises(UserError, match=r"--out.*line 2"):
        read_metrics(path)
    with pytest.raises(UserError, match="--out"):
        read_metrics(tmp_path / "missing.jsonl")


def test_a_record_must_be_complete(tmp_path: Path) -> None:
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        with pytest.raises(ValueError, match="seconds"):
            writer.write({k: v for k, v in record(1).items() if k != "seconds"})
        with pytest.raises(ValueError, match=r"bytes\.control"):
            writer.write(record(1) | {"bytes": dict.fromkeys(BYTE_KINDS[:-1], 0)})
    assert read_metrics(tmp_path / "metrics.jsonl") == []


def test_tensors_arrays_and_infinities_become_json(tmp_path: Path) -> None:
    extra = {
        "loss": float("nan"),
        "lr": np.float32(0.5),
        "grad_norm": torch.tensor(float("inf")),
        "expert_load": torch.arange(6).reshape(2, 3),
        "dtype": torch.bfloat16,
        "path": Path("a/b"),
    }
    with MetricsWriter(tmp_path, None, tensorboard=False) as writer:
        writer.write(record(1) | extra)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    read = json.loads((tmp_path / "metrics.jsonl").read_text(), parse_constant=refuse)
    assert read["loss"] is None and read["grad_norm"] is None and read["lr"] == 0.5
    assert read["expert_load"] == [[0, 1, 2], [3, 4, 5]]
    assert read["dtype"] == "torch.bfloat16" and read["path"] == "a/b"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_full_disk_is_one_line_that_names_out(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").symlink_to("/dev/full")
    with (
        pytest.raises(UserError, match=r"--out: .* is full; .*--resume"),
        MetricsWriter(tmp_path, None, tensorboard=False) as writer,
    ):
        writer.write(record(1))


def test_a_file_in_the_folders_place_is_one_line_that_names_out(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("not a folder")
    with pytest.raises(UserError, match="--out: cannot write"):
        MetricsWriter(tmp_path / "out", None, tensorboard=False)


def test_an_atomic_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "summary.json"
    write_json_atomic(path, {"kept": True})

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(UserError, match="full"):
        write_json_atomic(path, {"kept": False})
    assert json.loads(path.read_text()) == {"kept": True}
    assert [p.name for p in tmp_path.iterdir()] == ["summary.json"]


# ---------------------------------------------------------------- curves


def test_scalars_are_flattened_and_expert_load_becomes_imbalance() -> None:
    flat = dict(flatten_scalars({"loss": 2.0, "bytes": {"dispatch": 7}, "expert_load": [[1, 3], [2, 2]], "x": None}))
    assert flat == {
        "loss": 2.0,
        "bytes/dispatch": 7.0,
        "expert_load/layer_00_max_over_mean": 1.5,
        "expert_load/layer_01_max_over_mean": 1.0,
    }


def test_tensorboard_forgets_the_steps_that_a_resume_repeats(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with MetricsWriter(tmp_path, None) as writer:
        for step in range(1, 9):
            writer.write(record(step, valid_loss=9.0))
    with MetricsWriter(tmp_path, 5) as writer:
        for step in range(6, 8):
            writer.write(record(step, valid_loss=1.0))
        writer.sync()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert {"loss", "bytes/dispatch", "tokens_per_second"} <= set(events.Tags()["scalars"])
    assert [(e.step, e.value) for e in events.Scalars("valid_loss")] == [
        *((step, 9.0) for step in range(1, 6)),
        (6, 1.0),
        (7, 1.0),
    ]


# ---------------------------------------------------------------- summary


def make_summary(records: list[dict[str, Any]], **extra: Any) -> RunSummary:
    return RunSummary.from_records(
        records, recipe="luffy", model="tiny", world_size=4, peak_memory_bytes=10**9, extra=extra
    )


def test_a_summary_adds_up_its_records(tmp_path: Path) -> None:
    split = {"attention": 0.1, "experts": 0.2}
    records = [record(step, seconds_split=split) for step in range(1, 9)]
    records[0]["seconds"], records[3]["valid_loss"] = 60.0, 4.25
    summary = make_summary(records, seed=7)
    assert summary.steps == 8 and summary.final_loss == 5.0 / 8 and summary.valid_loss == 4.25
    assert summary.bytes["dispatch"] == 100 * sum(range(1, 9))
    assert summary.tokens_per_second == pytest.approx(2000.0)  # the slow first step is warm-up
    assert sum(summary.seconds.values()) == pytest.approx(60.0 + 7 * 0.5)
    assert summary.seconds["experts"] == pytest.approx(1.6)
    summary.write(tmp_path)
    stored = json.loads((tmp_path / "summary.json").read_text())
    assert list(stored)[:10] == [
        "recipe", "model", "world_size", "steps", "final_loss",
        "valid_loss", "tokens_per_second", "peak_memory_bytes", "bytes", "seconds",
    ]  # fmt: skip
    assert stored["seed"] == 7 and stored["total_tokens"] == 8000
    assert RunSummary.read(tmp_path) == summary


def test_a_summary_of_one_step_and_of_none() -> None:
    one = make_summary([record(1)])
    assert one.tokens_per_second == pytest.approx(2000.0) and one.seconds["other"] == 0.5
    none = make_summary([])
    assert none.steps == 0 and none.final_loss is None and none.tokens_per_second == 0.0


def test_extra_may_not_hide_the_summary() -> None:
    with pytest.raises(ValueError, match="steps"):
        make_summary([record(1)], steps=3).to_dict()


def test_the_machine_is_described_without_its_name() -> None:
    machine = describe_machine("cpu")
    assert machine["torch_version"] == torch.__version__ and machine["device"] == "cpu"
    assert os.uname().nodename not in machine["host"] or len(os.uname().nodename) < 3


# ---------------------------------------------------------------- progress


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def run_progress(steps: int, seconds: float, *, terminal: bool = False, enabled: bool = True, start: int = 0) -> str:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=80)
    with TrainProgress(steps, start_step=start, enabled=enabled, console=console, clock=clock) as progress:
        for step in range(start + 1, steps + 1):
            clock.now += seconds
            progress.step(step, loss=4.5, tokens=500, seconds=seconds, num_bytes=10**6)
    return out.getvalue()


def test_a_log_gets_the_first_and_last_step_and_every_five_percent() -> None:
    lines = run_progress(200, 0.5).splitlines()
    assert len(lines) == 21
    assert lines[0].startswith("train   1/200  loss 4.5000  1.00k tokens/s  1.00 MB moved  1 min 40 s left")
    assert lines[-1] == "train 200/200  loss 4.5000  1.00k tokens/s  200 MB moved"


def test_a_slow_run_shows_life_but_does_not_flood_a_log() -> None:
    lines = run_progress(1000, 60.0).splitlines()  # 16 hours
    assert "2/1000" in lines[1] and 100 < len(lines) < 260


def test_a_resumed_run_counts_from_where_it_stood() -> None:
    lines = run_progress(10, 1.0, start=8).splitlines()
    assert "9/10" in lines[0] and "1.00 s left" in lines[0] and len(lines) == 2


def test_a_terminal_gets_a_live_bar_that_fits() -> None:
    text = run_progress(20, 0.5, terminal=True)
    assert "20/20" in text and "loss" in text and "20.0 MB" in text


def test_other_ranks_say_nothing() -> None:
    assert run_progress(20, 0.5, enabled=False) == ""


@pytest.mark.parametrize("terminal", [False, True])
def test_a_phase_reports_with_and_without_a_total(terminal: bool) -> None:
    out, clock = io.StringIO(), Clock()
    console = Console(file=out, force_terminal=terminal, width=80)
    with phase("tokenise", console=console, clock=clock) as progress:
        progress(0, None, "reading files")
        progress(50, 100, "")
        progress(100, 100, "tokenising")
        clock.now = 2.0
    text = out.getvalue()
    assert "tokenise: 100/100 done in 2.00 s" in text
    if not terminal:
        assert text.splitlines()[:3] == ["reading files", "reading files: 50/100", "tokenising: 100/100"]


# ---------------------------------------------------------------- units


def test_numbers_for_people() -> None:
    assert [format_bytes(n) for n in (0, 512, 999.6, 1500, 12_345_678, 2.5e12)] == [
        "0 B", "512 B", "1.00 kB", "1.50 kB", "12.3 MB", "2.50 TB",
    ]  # fmt: skip
    assert [format_seconds(s) for s in (0, 2e-5, 0.0123, 0.9996, 4.2, 59.97, 200, 3599.8, 7500, 270000)] == [
        "0 s", "20.0 µs", "12.3 ms", "1.00 s", "4.20 s", "1 min 00 s", "3 min 20 s",
        "1 h 00 min", "2 h 05 min", "3 d 03 h",
    ]  # fmt: skip
    assert [format_count(n) for n in (7, 999, 1000, 99.96, 1_234_567)] == ["7", "999", "1.00k", "100", "1.23M"]
    assert format_rate(12.3e6) == "12.3 MB/s" and format_rate(45_600, "tokens") == "45.6k tokens/s"
    assert [format_share(p, 1000) for p in (380, 4, 0.2, 0)] == ["38 %", "0.4 %", "< 0.1 %", "0 %"]
    assert format_bytes(None) == format_seconds(float("nan")) == format_count(float("inf")) == "–"
