"""States of parts in checkpoints: JSON values in its description, tensors in a file of their own.

Every rank has the same ones, whatever the number of ranks, so they are written whole, by rank 0.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file
from torch import Tensor

from luffy.train.checkpoint_files import PARTS
from luffy.train.parts import Part


def states_of(parts: Sequence[Part]) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """(JSON values by part, tensors by "part.name")."""
    values: dict[str, Any] = {}
    tensors: dict[str, Tensor] = {}
    for part in parts:
        state = part.state()
        values[part.name] = {k: v for k, v in state.items() if not isinstance(v, Tensor)}
        tensors |= {f"{part.name}.{k}": v.contiguous() for k, v in state.items() if isinstance(v, Tensor)}
    return values, tensors


def load_states(parts: Sequence[Part], values: dict[str, Any], checkpoint: Path) -> None:
    """Give each part its state, {} to those that the checkpoint does not know."""
    path = checkpoint / PARTS
    tensors = load_file(path) if path.exists() else {}
    for part in parts:
        own = {k.removeprefix(f"{part.name}."): t for k, t in tensors.items() if k.startswith(f"{part.name}.")}
        part.load(values.get(part.name, {}) | own)
