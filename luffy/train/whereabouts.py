"""Where a thread of this process is, in a phrase, read from its stack: "all_to_all_single (dispatch) of MoE layer 3".

Nothing has to be announced while training runs: whoever wants to know looks. The stack tells the collective (a function
of torch.distributed or of luffy.comm), the layer (the MoE layer whose method is under way) and the part of the run.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from types import FrameType
from typing import Any

from luffy.comm.meter import TrafficMeter

_PARTS = {
    "evaluate": "evaluation",
    "train_step": "training",
    "save": "a checkpoint",
    "restore": "the reading of a checkpoint",
    "_load_data": "the preparation of data",
    "prepare": "measurements before the first step",
    "_export": "the export",
}
_COMM = {"wait": "all_to_all_single", "_send": "all_to_all_single", "_sum": "sum of gradients"}


@dataclass(frozen=True)
class Whereabouts:
    """phrase: for people. waiting: in a collective. key: changes as soon as the thread moves on."""

    phrase: str
    waiting: bool
    key: tuple[Any, ...]


def whereabouts(thread: int) -> Whereabouts:
    """Where the thread `thread` of this process is now."""
    frames: list[FrameType] = []
    frame = sys._current_frames().get(thread)
    while frame is not None:
        frames.append(frame)
        frame = frame.f_back
    key = (TrafficMeter.messages, *((id(f.f_code), f.f_lasti) for f in frames))
    return Whereabouts(_phrase(frames), _collective(frames) is not None, key)


def _file(frame: FrameType) -> str:
    return frame.f_code.co_filename.replace("\\", "/")


def _collective(frames: list[FrameType]) -> str | None:
    """The collective that the innermost frames are in."""
    found = None
    for frame in frames:
        name, file = frame.f_code.co_name, _file(frame)
        if "/torch/distributed/" in file:
            if file.endswith("distributed_c10d.py") and not name.startswith("_"):
                found = name  # the outermost one is what was called
            continue
        if found is None and "/luffy/comm/" in file:
            name = _COMM.get(name, name.removeprefix("_"))
            rows = f" ({TrafficMeter.last_direction})" if name == "all_to_all_single" else ""
            return name + rows
        if found is None and file.endswith(("torch/autograd/graph.py", "luffy/train/gradients.py")):
            return "the sum of gradients, or the backward pass before it"
        if found is not None and "/luffy/comm/rows.py" in file:
            return f"{found} ({TrafficMeter.last_direction})"
        return found
    return found


def _layer(frames: list[FrameType]) -> int | None:
    for frame in frames:
        if not _file(frame).endswith(("moe_layer.py", "residency.py", "planning.py", "block.py")):
            continue
        owner = frame.f_locals.get("self")
        for value in (frame.f_locals.get("layer"), getattr(owner, "layer", None)):
            if isinstance(value, int):
                return value
    return None


def _phrase(frames: list[FrameType]) -> str:
    ours = [f for f in frames if "/luffy/" in _file(f)]
    what = _collective(frames)
    if what is None:
        what = f"{ours[0].f_code.co_name} ({_file(ours[0]).rpartition('/luffy/')[2]})" if ours else "its start"
    layer = _layer(frames)
    at = "" if layer is None else f" of MoE layer {layer}"
    backward = any(f.f_code.co_name == "backward" for f in frames)
    part = next((_PARTS[f.f_code.co_name] for f in ours if f.f_code.co_name in _PARTS), None)
    if part == "training":
        part = "backward pass" if backward and not what.startswith("the sum") else None
    return f"{what}{at}" + (f", {part}" if part else "")
