"""Arithmetic of a comparison, against numbers worked out by hand."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from luffy.report.compare_table import phase_table, quality_table, speed_table, traffic_table
from luffy.report.roofline import link_seconds, roofline
from luffy.report.runs import BYTE_KINDS, Run, read_run
from luffy.report.summaries import differences, set_side_by_side, summarise, to_reach

from .synthetic import LAB


def run_of(tmp_path: Path, seconds: list[float], valid: dict[int, float], num_bytes: int = 100, **summary: Any) -> Run:
    """A run whose steps take `seconds` and move `num_bytes`; `valid` by step."""
    tmp_path.mkdir(parents=True, exist_ok=True)
    records = []
    for step, s in enumerate(seconds, start=1):
        record = {"step": step, "loss": 5.0, "tokens": 10, "seconds": s}
        record["bytes"] = dict.fromkeys(BYTE_KINDS, 0) | {"dispatch": num_bytes}
        records.append(record | ({"valid_loss": valid[step]} if step in valid else {}))
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (tmp_path / "summary.json").write_text(json.dumps(summary))
    return read_run(tmp_path)


def test_a_loss_is_reached_on_the_line_between_two_evaluations(tmp_path: Path) -> None:
    run = run_of(tmp_path, [1.0, 1.0, 2.0, 2.0], {2: 5.0, 4: 3.0})
    assert to_reach(run, 4.0) == pytest.approx((4.0, 300.0))  # half-way from (2 s, 200 B) to (6 s, 400 B)
    assert to_reach(run, 3.0) == pytest.approx((6.0, 400.0))
    assert to_reach(run, 5.5) == pytest.approx((2.0, 200.0))  # as early as anybody looked
    assert to_reach(run, 2.9) == (math.inf, math.inf)


def test_medians_and_spread_over_steps_and_repeats(tmp_path: Path) -> None:
    first = run_of(tmp_path / "a", [9.0, 1.0, 1.0, 1.0], {4: 3.0}, seed=0)
    second = run_of(tmp_path / "b", [9.0, 2.0, 2.0, 4.0], {4: 3.4}, seed=1)
    s = summarise("x", [first, second])
    assert s["step_seconds"] == pytest.approx([1.0, 1.5, 2.0])  # of 1 1 1 2 2 4: the first step warms up
    assert s["step_seconds_range"] == [1.0, 2.0]
    assert s["valid_loss"] == pytest.approx(3.2) and s["valid_loss_range"] == [3.0, 3.4]
    assert [r["seed"] for r in s["repeats"]] == [0, 1]
    assert s["curve"]["seconds"] == pytest.approx([14.5]) and s["curve"]["bytes"] == [400.0]
    assert s["phase_seconds"]["other"] == pytest.approx(11 / 6)  # nobody split the steps
    assert s["roofline"] is None


def test_time_to_loss_within_rounding_and_never(tmp_path: Path) -> None:
    slow = [run_of(tmp_path / "a", [2.0] * 4, {2: 4.0, 4: 3.0}, 200)]
    fast = [run_of(tmp_path / "b", [1.0] * 4, {2: 4.0, 4: 3.0001}, 100)]  # the same but for rounding
    worse = [run_of(tmp_path / "c", [0.5] * 4, {2: 4.0, 4: 3.5}, 50)]
    runs = [slow, fast, worse]
    summaries = [summarise(name, r) for name, r in zip(("slow", "fast", "worse"), runs, strict=True)]
    set_side_by_side(summaries, runs)
    a, b, c = summaries
    assert b["speedup_over"] == {"slow": pytest.approx(2.0), "worse": pytest.approx(0.5)}
    assert b["speedup_to_loss_over"]["slow"] == pytest.approx(2.0, rel=1e-3)
    assert a["bytes_to_loss"] / b["bytes_to_loss"] == pytest.approx(2.0, rel=1e-3)
    assert c["seconds_to_loss"] is None and c["speedup_to_loss_over"] == {"slow": None, "fast": None}
    assert b["speedup_to_loss_over"]["worse"] is None
    assert quality_table(summaries)[1][2][-2] == "not reached"
    set_side_by_side(summaries, runs, target_loss=3.5)
    assert [s["target_loss"] for s in summaries] == [3.5] * 3
    assert c["seconds_to_loss"] == pytest.approx(2.0) and a["seconds_to_loss"] == pytest.approx(6.0)


def test_the_roofline_is_the_slower_of_computation_and_the_busiest_class_of_link() -> None:
    moved = {"intra_node": 8e6, "inter_node": 6e6}
    # 8 MB over 4 ranks' links and 6 MB over the 2 cards of 2 nodes, at 10 MB/s each.
    assert link_seconds({"lab": LAB}, moved) == {"intra_node": 0.2, "inter_node": 0.3}
    assert link_seconds({"lab": LAB | {"nic": "rank"}}, moved)["inter_node"] == pytest.approx(0.15)
    phases = {"attention": 0.1, "experts": 0.05, "exchange": 9.0, "gradients": 9.0, "other": 0.05}
    found = roofline({"lab": LAB}, phases, moved)
    assert found["compute_seconds"] == pytest.approx(0.2)  # waiting for links is no computation
    assert (found["seconds"], found["bound"]) == (0.3, "inter_node")
    assert roofline({"lab": LAB}, phases | {"attention": 0.4}, moved)["bound"] == "computation"
    assert roofline({}, phases, moved) is None


def test_hidden_exchange_is_shown_and_is_no_part_of_the_step(tmp_path: Path) -> None:
    out = run_of(tmp_path, [1.0] * 4, {}).out_dir
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    for r in records:
        r["seconds_split"], r["exchange_hidden_seconds"] = {"attention": 0.6, "exchange": 0.4}, 0.3
    (out / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    s = summarise("x", [read_run(out)])
    assert s["exchange_hidden_seconds"] == pytest.approx(0.3)
    assert sum(s["phase_seconds"].values()) == pytest.approx(1.0)
    head, rows = phase_table([s])
    shown = dict(zip(head, rows[0], strict=True))
    assert shown["exchange, exposed"] == "400 ms" and shown["exchange, hidden"] == "300 ms"
    assert shown["mean step"] == "1.00 s"


def test_runs_made_elsewhere_say_what_sets_them_apart(tmp_path: Path) -> None:
    here = run_of(tmp_path / "a", [1.0], {}, world_size=4, model="m", dtype="float32")
    there = run_of(tmp_path / "b", [1.0], {}, world_size=2, model="m", dtype="bfloat16")
    assert differences(there, here) == ["world size 2 (here 4)", "dtype bfloat16 (here float32)"]
    # A run that timed no phases has no share of exchange, rather than one of zero.
    s = [summarise("x", [here]), summarise("y", [there]) | {"elsewhere": True, "differs": []}]
    set_side_by_side(s, [[here], [there]])
    head, rows = speed_table(s)
    assert "exchange" not in head and [row[0] for row in rows] == ["x", "y*"]
    head, rows = traffic_table(s)
    assert dict(zip(head, rows[1], strict=True))["bytes a step"] == "100 B"
