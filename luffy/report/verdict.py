"""What a comparison comes to, in one sentence a recipe: bytes, speed and held-out loss beside the first recipe."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from luffy.report.compare_table import name_of, total_bytes

LEVEL = 0.05  # closer than this is said to be level: repeats of one recipe differ by as much
LOSS_LEVEL = 0.005  # nats a token


def bytes_words(summary: dict[str, Any], first: dict[str, Any], more: str = "") -> str:
    """`4.1x fewer bytes`; more: what stands behind, such as ` than vanilla`."""
    mine, theirs = total_bytes(summary), total_bytes(first)
    if not mine or not theirs:
        return "bytes not counted"
    return _ratio(theirs / mine, "fewer bytes", "more bytes", "as many bytes", more)


def speed_words(summary: dict[str, Any], first: dict[str, Any]) -> str:
    """`2.3x faster`: of median steps."""
    return _ratio(first["step_seconds"][1] / summary["step_seconds"][1], "faster", "slower", "as fast")


def loss_words(summary: dict[str, Any], first: dict[str, Any]) -> str:
    """`same loss`, or the difference of held-out losses in nats a token."""
    mine, theirs = summary.get("valid_loss"), first.get("valid_loss")
    if mine is None or theirs is None:
        return "loss not measured"
    return "same loss" if abs(mine - theirs) < LOSS_LEVEL else f"loss {mine - theirs:+.3f} nats"


def sentence(summary: dict[str, Any], first: dict[str, Any], timed: bool = True) -> str:
    """`4.1x fewer bytes than vanilla, 2.3x faster, same loss`. timed: without, nothing is said of speed."""
    parts = [bytes_words(summary, first, f" than {first['label']}")]
    if timed:
        parts.append(speed_words(summary, first))
    return ", ".join([*parts, loss_words(summary, first)])


def verdicts(summaries: Sequence[dict[str, Any]]) -> list[tuple[str, str]]:
    """(recipe, sentence) of every recipe but the first."""
    first = summaries[0]
    return [(name_of(s), sentence(s, first)) for s in summaries[1:]]


def _ratio(ratio: float, better: str, worse: str, level: str, more: str = "") -> str:
    """ratio: how many times better."""
    if abs(ratio - 1) < LEVEL:
        return level + more.replace(" than ", " as ")
    number = max(ratio, 1 / ratio)
    return f"{number:.{1 if number >= 2 else 2}f}x {better if ratio > 1 else worse}{more}"
