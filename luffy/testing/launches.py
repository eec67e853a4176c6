"""How many things a GPU is asked to do."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import DeviceType


def launches(action: Callable[[], Any]) -> dict[str, tuple[int, float]]:
    """Kernels, copies and fills that the GPU does for `action`: by name, how often and microseconds in all.

    Empty where the profiler cannot see the device.
    """
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        action()
        torch.cuda.synchronize()
    found: dict[str, tuple[int, float]] = {}
    for event in profile.events():
        if event.device_type == DeviceType.CUDA:
            count, microseconds = found.get(event.name, (0, 0.0))
            found[event.name] = (count + 1, microseconds + event.time_range.elapsed_us())
    return found
