"""Runs of peers and of Luffy side by side: a Markdown table, and JSON with what it was made from."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from luffy.errors import UserError
from luffy.report.runs import BYTE_KINDS, Run, read_run, warmup_steps

TOKEN_ROWS = ("dispatch", "combine", "dispatch_backward", "combine_backward")
# Runs are only comparable where these agree.
_SAME = ("model", "world_size", "steps", "seed", "dtype", "total_tokens")


def describe(run: Run, times: bool) -> dict[str, Any]:
    """One run: bytes a step (first step, and mean of all), losses, and times if they are wanted."""
    mean = {k: statistics.fmean(r["bytes"][k] for r in run.records) for k in BYTE_KINDS}
    out = {
        "recipe": run.summary["recipe"],
        **{name: run.lookup(name) for name in _SAME},
        "first_loss": run.records[0]["loss"],
        "valid_loss": run.summary["valid_loss"],
        "bytes_first_step": run.records[0]["bytes"],
        "bytes_per_step": {k: round(v) for k, v in mean.items()},
        "differs": run.summary.get("differs", {}),
        "environment": run.summary.get("environment", {}),
    }
    if times:
        timed = [r["seconds"] for r in run.records[warmup_steps(len(run.records)) :]]
        out["step_seconds_median"] = statistics.median(timed)
        out["tokens_per_second"] = run.summary["tokens_per_second"]
        out["peak_memory_bytes"] = run.summary["peak_memory_bytes"]
        out["network"] = run.lookup("network")
    return out


def collect(folders: Sequence[Path], times: bool = False) -> list[dict[str, Any]]:
    """Raises UserError for runs that differ in more than the system."""
    rows = [describe(read_run(folder), times) for folder in folders]
    for folder, row in zip(folders, rows, strict=True):
        for name in _SAME:
            if row[name] != rows[0][name]:
                raise UserError(f"{folder} has {name} {row[name]}, {folders[0]} {rows[0][name]}: run both alike")
    return rows


def _megabytes(num_bytes: Mapping[str, int], kinds: Sequence[str]) -> str:
    return f"{sum(num_bytes[k] for k in kinds) / 1e6:.3f}"


def markdown(rows: Sequence[Mapping[str, Any]]) -> str:
    """MB a step over all ranks."""
    times = "step_seconds_median" in rows[0]
    head = ["run", "token rows, step 1", "token rows", "gradients", "experts", "control", "loss at step 1", "held out"]
    head += ["s a step", "tokens/s", "peak GB"] if times else []
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        mean = row["bytes_per_step"]
        cells = [row["recipe"], _megabytes(row["bytes_first_step"], TOKEN_ROWS), _megabytes(mean, TOKEN_ROWS)]
        cells += [_megabytes(mean, [k]) for k in ("gradients", "experts", "control")]
        cells += [f"{row['first_loss']:.4f}", f"{row['valid_loss']:.4f}"]
        if times:
            cells += [f"{row['step_seconds_median']:.3f}", f"{row['tokens_per_second']:,.0f}"]
            cells += [f"{row['peak_memory_bytes'] / 1e9:.2f}"]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def write(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    path.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
