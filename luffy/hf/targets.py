"""What LoRA adapters can be put on, and what goes together: told before anything is loaded."""

from __future__ import annotations

from collections.abc import Collection

from luffy.errors import UserError

TARGETS = ("attention", "experts", "router")


def check_targets(on: Collection[str], dora: bool, sharded: bool) -> None:
    """UserError for what is unknown, or cannot be combined. sharded: dense weights are divided over ranks."""
    if not on or any(name not in TARGETS for name in on):
        raise UserError(f"--lora-on {','.join(on)}: name some of {', '.join(TARGETS)}")
    if dora and sharded:
        raise UserError("--dora needs whole weights: leave --dense sharded out")
    if dora and list(on) != ["attention"]:
        raise UserError(f"--dora goes with --lora-on attention, not {','.join(on)}: PEFT has none for those")
