"""The phase clock: where a step's time goes, forward and backward, without a profiler.

A step is a chain of phases (attention, exchange, experts, ...). `boundary` puts an identity into the autograd graph
between two phases: passed forward it ends the first and begins the second, passed backward the other way round.
On the CPU the clock is the wall clock; on a GPU it is a chain of device events, read once at the end of the step, so
that timing costs no synchronisation.
"""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

PHASES = ("attention", "experts", "exchange", "plan", "condense", "gradients", "other")


class PhaseClock:
    """Adds up seconds per phase. `start` at the beginning of a step, `take` at its end."""

    def __init__(self, device: torch.device) -> None:
        self.on_gpu = device.type == "cuda"
        self._marks: list[tuple[str, Any]] = []
        self._running = False

    def start(self) -> None:
        self._running, self._marks = True, []
        self.switch("other")

    def switch(self, phase: str) -> None:
        """From here on time belongs to `phase`. Does nothing outside start..take (evaluation, warm-up)."""
        if not self._running:
            return
        if self.on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self._marks.append((phase, event))
        else:
            self._marks.append((phase, time.perf_counter()))

    def take(self) -> dict[str, float]:
        """Seconds per phase since `start`. On a GPU this waits for the device."""
        self.switch("end")
        self._running = False
        seconds = dict.fromkeys(PHASES, 0.0)
        if self.on_gpu and self._marks:
            self._marks[-1][1].synchronize()
        for (phase, begin), (_, end) in zip(self._marks, self._marks[1:], strict=False):
            seconds[phase] += begin.elapsed_time(end) / 1e3 if self.on_gpu else end - begin
        return seconds


class _Boundary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, clock, before, after):
        ctx.clock, ctx.before = clock, before
        clock.switch(after)
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.switch(ctx.before)
        return grad, None, None, None


def boundary(x: Tensor, clock: PhaseClock, before: str, after: str) -> Tensor:
    """Identity on `x` that marks the boundary between two phases in both passes."""
    return _Boundary.apply(x, clock, before, after)
