"""What the runs of one recipe come to, and how recipes compare: arithmetic on records that are already on the disk.

Two rules. Times are medians over the steps after warm-up of all repeats, with the quartiles of the steps and the range
of the repeats' own medians beside them: the first says how even a run was, the second how far another day may differ.
And a quality is reached when a *held-out* loss says so, between two evaluations by a straight line; time is that of
training steps (by the wall clock), as evaluations are not what is compared.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from luffy.report.roofline import roofline
from luffy.report.runs import BYTE_KINDS, SECONDS_KINDS, Run, column, moved_num_bytes, warmup_steps

# A loss is reached within this: two runs of one recipe differ by more (docs/research/log.md), lossless by rounding.
LOSS_TOLERANCE = 0.01


def summarise(label: str, runs: Sequence[Run]) -> dict[str, Any]:
    """The summary of the first run, numbers replaced by medians over `runs`, its repeats, and what is added here."""
    kept = [run.records[min(warmup_steps(len(run.records)), len(run.records) - 1) :] for run in runs]
    pooled = [record for records in kept for record in records]
    seconds = column(pooled, "seconds")
    own = [float(np.nanmedian(column(records, "seconds"))) for records in kept]
    phases = _phases(pooled)
    everything = [record for run in runs for record in run.records]
    by_link = {kind: _mean(column(everything, "bytes_by_link", kind)) for kind in ("intra_node", "inter_node")}
    summary = runs[0].summary
    first = {**summary, "label": label}
    for key in ("valid_loss", "final_loss", "tokens_per_second", "peak_memory_bytes"):
        values = [run.summary[key] for run in runs if run.summary.get(key) is not None]
        first[key] = float(np.median(values)) if values else None
    curve = _curve(runs)
    return first | {
        "step_seconds": [float(np.nanquantile(seconds, q)) for q in (0.25, 0.5, 0.75)],
        "step_seconds_range": [min(own), max(own)],
        # Means over all steps, as on a run's own page: what a re-homing moves now and then is part of them.
        "step_bytes": {kind: _mean(column(everything, "bytes", kind)) for kind in BYTE_KINDS},
        "step_bytes_by_link": by_link,
        "phase_seconds": phases,
        # Exchange that went on behind computation: no part of the step's time.
        "exchange_hidden_seconds": _mean(column(pooled, "exchange_hidden_seconds")) or None,
        "roofline": roofline(summary, phases, by_link) if phases_known(phases) else None,
        "plan": {key: _median(column(pooled, "plan", key)) for key in ("moved_share", "seconds", "exposed_seconds")},
        "tokens_spread": _median(column(pooled, "tokens_max_over_mean")),
        "valid_loss_range": curve["valid_loss_range"][-1] if curve["step"] else None,
        "kept_by_layer": kept_by_layer(runs),
        "favourite_rank_share": _last_list(runs, "favourite_rank_share"),
        "curve": curve,
        "repeats": [
            {
                "step_seconds": median,
                **{key: run.summary.get(key) for key in ("seed", "valid_loss", "final_loss", "tokens_per_second")},
            }
            for run, median in zip(runs, own, strict=True)
        ],
    }


def _median(values: np.ndarray) -> float:
    """0 where nothing was recorded."""
    known = values[np.isfinite(values)]
    return float(np.median(known)) if known.size else 0.0


def _mean(values: np.ndarray) -> float:
    known = values[np.isfinite(values)]
    return float(known.mean()) if known.size else 0.0


def _phases(records: Sequence[dict[str, Any]]) -> dict[str, float]:
    """Mean seconds of a step by phase: medians would not add up. What no phase claims is `other`."""
    split = {kind: _mean(column(records, "seconds_split", kind)) for kind in SECONDS_KINDS}
    split["other"] += max(0.0, _mean(column(records, "seconds")) - sum(split.values()))
    return split


def phases_known(phases: dict[str, float]) -> bool:
    """Whether anybody timed the phases: all of it `other` is what a run says that did not."""
    return any(seconds for kind, seconds in phases.items() if kind != "other")


def _last_list(runs: Sequence[Run], key: str) -> list[float] | None:
    lists = [record[key] for run in runs for record in run.records[-1:] if isinstance(record.get(key), list)]
    return [float(x) for x in np.mean(lists, axis=0)] if lists else None


def kept_by_layer(runs: Sequence[Run]) -> list[float] | None:
    """Share of copies sent by each MoE layer, over all steps in which the run condensed; None if it never did."""
    names = sorted({key for run in runs for r in run.records for key in r.get("condense", ()) if key[:6] == "layer_"})
    records = [record for run in runs for record in run.records]
    return [_mean(column(records, "condense", name, "kept")) for name in names] or None


def cumulative(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """After each step: seconds of training so far, and bytes that left a rank so far."""
    return np.nancumsum(column(run.records, "seconds")), moved_num_bytes(run.records)


def _curve(runs: Sequence[Run]) -> dict[str, list[Any]]:
    """Held-out loss at the steps that all repeats evaluated; medians over them, and the losses' range."""
    found: list[dict[int, tuple[float, float, float]]] = []
    for run in runs:
        valid, steps, (seconds, moved) = column(run.records, "valid_loss"), run.steps, cumulative(run)
        known = np.flatnonzero(np.isfinite(valid))
        found.append({int(steps[i]): (float(valid[i]), float(seconds[i]), float(moved[i])) for i in known})
    common = sorted(set.intersection(*(set(points) for points in found)))
    table = np.array([[points[step] for step in common] for points in found]).reshape(len(found), len(common), 3)
    middle = np.median(table, axis=0)
    return {
        "step": common,
        "valid_loss": middle[:, 0].tolist(),
        "seconds": middle[:, 1].tolist(),
        "bytes": middle[:, 2].tolist(),
        "valid_loss_range": np.stack([table[:, :, 0].min(0), table[:, :, 0].max(0)], axis=1).tolist(),
    }


def to_reach(run: Run, target: float) -> tuple[float, float]:
    """(seconds of training, bytes) until the held-out loss is at `target`; infinite if it never was."""
    valid, (seconds, moved) = column(run.records, "valid_loss"), cumulative(run)
    known = np.flatnonzero(np.isfinite(valid))
    below = np.flatnonzero(valid[known] <= target)
    if not below.size:
        return math.inf, math.inf
    at = known[below[0]]
    if below[0] == 0:
        return float(seconds[at]), float(moved[at])
    before = known[below[0] - 1]
    part = (valid[before] - target) / (valid[before] - valid[at])
    return tuple(float(x[before] + part * (x[at] - x[before])) for x in (seconds, moved))  # type: ignore[return-value]


def set_side_by_side(
    summaries: Sequence[dict[str, Any]], runs: Sequence[Sequence[Run]], target_loss: float | None = None
) -> None:
    """Add to each summary its ratios to the others, and what it took to reach the loss of the first one's end.

    `target_loss` overrides that loss. Not reached is None: by the median over repeats.
    """
    ends = summaries[0].get("valid_loss")
    target = target_loss if target_loss is not None else ends + LOSS_TOLERANCE if ends is not None else None
    for mine, repeats in zip(summaries, runs, strict=True):
        reached = [to_reach(run, target) for run in repeats] if target is not None else [(math.inf, math.inf)]
        seconds, moved = (float(np.median(values)) for values in zip(*reached, strict=True))
        mine["target_loss"] = target
        mine["seconds_to_loss"] = seconds if math.isfinite(seconds) else None
        mine["bytes_to_loss"] = moved if math.isfinite(moved) else None
    for mine in summaries:
        others = [other for other in summaries if other is not mine]
        mine["speedup_over"] = {o["label"]: o["step_seconds"][1] / mine["step_seconds"][1] for o in others}
        mine["speedup_to_loss_over"] = {
            o["label"]: ratio(o["seconds_to_loss"], mine["seconds_to_loss"]) for o in others
        }


def ratio(theirs: float | None, mine: float | None) -> float | None:
    return theirs / mine if theirs is not None and mine else None


def said_to_differ(run: Run) -> list[str]:
    """What a summary's own `differs` says: a text, a list of them, or texts by topic."""
    said = run.summary.get("differs")
    if isinstance(said, dict):
        return [f"{topic.replace('_', ' ')}: {text}" for topic, text in said.items()]
    return [str(text) for text in said] if isinstance(said, list) else [str(said)] if said else []


def differences(mine: Run, first: Run) -> list[str]:
    """What sets a run made elsewhere apart from the first of a comparison, as far as their files say."""
    found = []
    for name in ("model", "world_size", "device_name", "dtype", "provenance", "network"):
        here, there = mine.lookup(name), first.lookup(name)
        if here is not None and here != there and not isinstance(here, dict) and not isinstance(there, dict):
            found.append(f"{name.replace('_', ' ')} {here} (here {there or 'not given'})")
    tokens = [float(np.nanmean(column(run.records, "tokens"))) for run in (mine, first)]
    if all(map(math.isfinite, tokens)) and abs(tokens[0] / tokens[1] - 1) > 0.01:
        found.append(f"{tokens[0]:.0f} tokens a step (here {tokens[1]:.0f})")
    return found
