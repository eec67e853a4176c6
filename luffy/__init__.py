"""Luffy: Mixture-of-Experts training across links slower than they should be.

What is public is in docs/stability.md: `__all__` here and in `luffy.hf`, and the command line. Every other name may
change in any release.

Names are imported when they are first used, so that `import luffy` alone stays instant.
"""

import importlib
from typing import TYPE_CHECKING, Any

from luffy.version import __version__

if TYPE_CHECKING:
    from luffy.comm.mesh import use_mesh
    from luffy.model.balancing import LossFreeBias
    from luffy.model.block import MoEBlock
    from luffy.train.gradients import GradientSync
    from luffy.train.launch import join_world
    from luffy.train.own_metrics import metrics
    from luffy.train.own_seats import Seats
    from luffy.train.own_state import load_checkpoint, load_weights, save_checkpoint, save_weights

_HOMES = {
    "MoEBlock": "model.block",
    "LossFreeBias": "model.balancing",
    "GradientSync": "train.gradients",
    "Seats": "train.own_seats",
    "join_world": "train.launch",
    "save_checkpoint": "train.own_state",
    "load_checkpoint": "train.own_state",
    "save_weights": "train.own_state",
    "load_weights": "train.own_state",
    "metrics": "train.own_metrics",
    "use_mesh": "comm.mesh",
}
__all__ = [
    "GradientSync", "LossFreeBias", "MoEBlock", "Seats", "__version__", "join_world", "load_checkpoint",
    "load_weights", "metrics", "save_checkpoint", "save_weights", "use_mesh",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"luffy.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
