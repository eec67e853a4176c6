"""Luffy: Mixture-of-Experts training across links slower than they should be.

For a model of your own: `join_world`, `MoEBlock`, `GradientSync` (docs/own_model.md). They are imported when they are
first used, so that `import luffy` alone stays instant.
"""

import importlib
from typing import Any

from luffy.version import __version__

_HOMES = {
    "MoEBlock": "model.block",
    "LossFreeBias": "model.balancing",
    "GradientSync": "train.gradients",
    "join_world": "train.launch",
    "save_checkpoint": "train.own_state",
    "load_checkpoint": "train.own_state",
    "save_weights": "train.own_state",
    "load_weights": "train.own_state",
    "metrics": "train.own_metrics",
    "use_mesh": "comm.mesh",
}
__all__ = [
    "GradientSync", "LossFreeBias", "MoEBlock", "__version__", "join_world", "load_checkpoint", "load_weights",
    "metrics", "save_checkpoint", "save_weights", "use_mesh",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"luffy.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
