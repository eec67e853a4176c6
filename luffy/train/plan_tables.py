"""The tables of `luffy plan`: recipes, and ways to train that are not ours."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from luffy.plan.advice import Alternative
from luffy.plan.prediction import Prediction
from luffy.report.units import format_bytes, format_count, format_seconds


def show_predictions(predictions: Sequence[Prediction], compute_seconds: float | None, console: Console) -> None:
    console.print("one step, forward and backward: bytes counted by replay, seconds predicted")
    table = Table(box=None, pad_edge=False)
    columns = ["in nodes", "between", "share", "links busy", "seated", "moved"]
    if compute_seconds is not None:
        columns += ["step", "speed-up"]
    table.add_column("recipe", no_wrap=True)
    for column in columns:
        table.add_column(column, justify="right", no_wrap=True)
    first = predictions[0]
    for p in predictions:
        share = sum(p.num_bytes) / sum(first.num_bytes) if sum(first.num_bytes) else 1.0
        cells = [format_bytes(p.num_bytes[0]), format_bytes(p.num_bytes[1]), f"{share:.2f}"]
        cells += [format_seconds(p.exchange_seconds), f"{p.seated_share:.0%}", f"{p.moved_share:.0%}"]
        if compute_seconds is not None:
            step = compute_seconds + p.exchange_seconds
            cells += [format_seconds(step), f"{(compute_seconds + first.exchange_seconds) / step:.2f}x"]
        table.add_row(p.recipe, *cells)
    console.print(table)
    console.print(f"share and speed-up are over {first.recipe}")
    if rehomed := [p.recipe for p in predictions if p.rehomed]:
        console.print(f"{', '.join(rehomed)}: experts re-homed to earlier steps of the trace")


def show_alternatives(
    alternatives: Sequence[Alternative], taken: Prediction, num_tokens: float, console: Console
) -> None:
    """Bytes a token by link class, and when each wins over the recipe that is advised."""
    table = Table(box=None, pad_edge=False)
    table.add_column("bytes a token (predicted)", no_wrap=True)
    for column in ("in nodes", "between", "links busy", "idle", "less busy"):
        table.add_column(column, justify="right", no_wrap=True)
    rows = [(f"{taken.recipe}, for comparison", taken.num_bytes, taken.exchange_seconds, 0.0, "")]
    for a in alternatives:
        tokens = a.enough_tokens(taken.exchange_seconds, num_tokens)
        when = "yes" if a.seconds < taken.exchange_seconds else "no"
        if tokens is not None:
            when += f", from {format_count(tokens)} tokens a step"
        rows.append((a.name, a.num_bytes, a.seconds, a.idle_share, when))
    for name, num_bytes, seconds, idle, when in rows:
        cells = [format_bytes(n / num_tokens) for n in num_bytes]
        table.add_row(name, *cells, format_seconds(seconds), f"{idle:.0%}", when)
    console.print("\nother ways to train, on the same links")
    console.print(table)
