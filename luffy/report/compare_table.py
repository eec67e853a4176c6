"""The tables of a comparison, the same rows for a terminal and for a page.

Ratios are always "how many times better than the first recipe": of times, its time over mine; of bytes likewise.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luffy.report.runs import SECONDS_KINDS
from luffy.report.style import label_of
from luffy.report.summaries import phases_known, ratio
from luffy.report.units import DASH, format_bytes, format_count, format_loss, format_seconds

Table = tuple[list[str], list[list[str]]]  # head, rows


def _times(value: float | None) -> str:
    return DASH if value is None else f"{value:.2f}×"


def name_of(summary: dict[str, Any]) -> str:
    """A recipe's label; runs made elsewhere wear a mark."""
    return summary["label"] + ("*" if summary.get("elsewhere") else "")


def total_bytes(summary: dict[str, Any]) -> float:
    return float(sum(summary["step_bytes"].values()))


def speed_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Step time with its spread, the ratio to the first recipe, and what bounds it."""
    first = summaries[0]
    over = f"vs {first['label']}"
    head = ["recipe", "step time", "quartiles", "medians of repeats", over, "tokens/s", "exchange", "roofline",
            "reached", "peak memory"]  # fmt: skip
    rows = []
    for s in summaries:
        low, middle, high = s["step_seconds"]
        roof, mean = s.get("roofline"), sum(s["phase_seconds"].values())
        rows.append(
            [
                name_of(s),
                format_seconds(middle),
                f"{format_seconds(low)} to {format_seconds(high)}",
                " to ".join(map(format_seconds, s["step_seconds_range"])) if len(s["repeats"]) > 1 else DASH,
                _times(first["step_seconds"][1] / middle),
                format_count(s.get("tokens_per_second")),
                f"{100 * s['phase_seconds']['exchange'] / mean:.0f} %" if phases_known(s["phase_seconds"]) else DASH,
                f"{format_seconds(roof['seconds'])} ({bound_of(roof)})" if roof else DASH,
                f"{100 * roof['seconds'] / mean:.0f} %" if roof else DASH,
                format_bytes(s.get("peak_memory_bytes") or None),
            ]
        )
    return drop_empty((head, rows))


def bound_of(roof: dict[str, Any]) -> str:
    """What a roofline is made of, in a word."""
    return "compute" if roof["bound"] == "computation" else "wire"


def traffic_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Bytes of a mean step, and what the recipe did to keep them few."""
    first = summaries[0]
    fewer = f"fewer than {first['label']}"
    head = ["recipe", "bytes a step", fewer, "dispatch", "combine", "both backwards", "experts",
            "gradients", "within nodes", "between nodes", "copies kept", "moved", "planning", "of it exposed",
            "tokens max/mean"]  # fmt: skip
    rows = []
    for s in summaries:
        b, plan, links = s["step_bytes"], s["plan"], s["step_bytes_by_link"]
        rows.append(
            [
                name_of(s),
                format_bytes(total_bytes(s)),
                _times(ratio(total_bytes(first), total_bytes(s))),
                format_bytes(b["dispatch"] or None),
                format_bytes(b["combine"] or None),
                format_bytes(b["dispatch_backward"] + b["combine_backward"] or None),
                format_bytes(b["experts"] or None),
                format_bytes(b["gradients"] or None),
                format_bytes(links["intra_node"] or None),
                format_bytes(links["inter_node"] or None),
                f"{100 * s['copies_kept']:.0f} %" if s.get("copies_kept") is not None else DASH,
                f"{100 * plan['moved_share']:.0f} %" if plan["moved_share"] else DASH,
                format_seconds(plan["seconds"] or None),
                format_seconds(plan["exposed_seconds"]) if plan["seconds"] else DASH,
                f"{s['tokens_spread']:.2f}" if s["tokens_spread"] else DASH,
            ]
        )
    return drop_empty((head, rows))


def quality_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Held-out loss, and time and bytes until the target is reached."""
    first = summaries[0]
    target = format_loss(first.get("target_loss"))
    head = ["recipe", "held-out loss", "range", f"time to {target}", f"faster than {first['label']}",
            f"bytes to {target}", "fewer"]  # fmt: skip
    rows = []
    for s in summaries:
        low, high = s.get("valid_loss_range") or (None, None)
        rows.append(
            [
                name_of(s),
                format_loss(s.get("valid_loss")),
                f"{format_loss(low)} to {format_loss(high)}" if low != high else DASH,
                format_seconds(s["seconds_to_loss"]) if s["seconds_to_loss"] is not None else "not reached",
                _times(ratio(first["seconds_to_loss"], s["seconds_to_loss"])),
                format_bytes(s["bytes_to_loss"]) if s["bytes_to_loss"] is not None else "not reached",
                _times(ratio(first["bytes_to_loss"], s["bytes_to_loss"])),
            ]
        )
    return drop_empty((head, rows))


def phase_table(summaries: Sequence[dict[str, Any]]) -> Table:
    """Mean step by phase. Exchange that hid behind computation stands apart: it is no part of the step."""
    hides = any(s["exchange_hidden_seconds"] for s in summaries)
    names = ["exchange, exposed" if kind == "exchange" and hides else label_of(kind) for kind in SECONDS_KINDS]
    head = ["recipe", *names, "exchange, hidden", "mean step"]
    rows = []
    for s in summaries:
        known = phases_known(s["phase_seconds"])
        phases = [format_seconds((known and s["phase_seconds"].get(kind)) or None) for kind in SECONDS_KINDS]
        hidden = format_seconds(s["exchange_hidden_seconds"])
        rows.append([name_of(s), *phases, hidden, format_seconds(sum(s["phase_seconds"].values()))])
    return drop_empty((head, rows))


def ratio_table(summaries: Sequence[dict[str, Any]], key: str = "speedup_over") -> Table:
    """Every pair: how many times faster the row is than the column."""
    labels = [s["label"] for s in summaries]
    return ["recipe", *(f"over {label}" for label in labels)], [
        [name_of(s), *(_times(s[key].get(label)) if label != s["label"] else "1" for label in labels)]
        for s in summaries
    ]


def drop_empty(table: Table) -> Table:
    """Without the columns in which nothing was measured for anyone."""
    head, rows = table
    full = [i for i in range(len(head)) if any(row[i] != DASH for row in rows)]
    return [head[i] for i in full], [[row[i] for i in full] for row in rows]


def as_text(table: Table) -> str:
    """Columns of even width; names to the left, numbers to the right."""
    head, rows = table
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    lines = []
    for row in (head, *rows):
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join([row[0].ljust(widths[0]), *cells]))
    return "\n".join(lines)


def remarks(summaries: Sequence[dict[str, Any]]) -> list[str]:
    """What must be said beside the tables: of repeats and their seeds."""
    found = []
    count = max(len(s["repeats"]) for s in summaries)
    if count > 1:
        seeds = {r.get("seed") for r in summaries[0]["repeats"]}
        found.append(
            f"{count} repeats of each recipe, in turn" + (", each with its own seed" if len(seeds) > 1 else "")
        )
    return found


def text_tables(summaries: Sequence[dict[str, Any]]) -> str:
    """All of it, for a terminal."""
    tables = [speed_table(summaries), phase_table(summaries), traffic_table(summaries), quality_table(summaries)]
    notes = remarks(summaries)
    if network := summaries[0].get("network"):
        notes.append(str(network))
    for s in summaries:
        if s.get("elsewhere"):
            notes.append(f"{name_of(s)}: made elsewhere; {'; '.join(s['differs']) or 'no difference is known'}")
    return "\n\n".join([*map(as_text, tables), "\n".join(notes)]).rstrip()
