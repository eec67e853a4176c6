"""The end of a process: no thread of a backend may need Python once the interpreter shuts down.

gloo calls what is attached to a collective on threads of its own, and lets go of its tensors there. A caller that waits
for the result may go on, and end, before such a thread is done. A thread that asks for the interpreter while it shuts
down is ended by it, within C++ code that allows no such thing: `terminate called without an active exception`, SIGABRT,
after all work was done and saved. Therefore a process that ends waits here for those threads, before anything is taken
down. Destroying the process group does not: its threads live as long as anybody still holds a group.
"""

from __future__ import annotations

import atexit
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

Result = TypeVar("Result")

PATIENCE = 2.0  # seconds; what a lost rank has left behind never comes to an end
_THREADS = "pt_gloo_runloop"
_TASKS = Path("/proc/self/task")
_PAUSE, _STEADY = 0.005, 3

_lock = threading.Lock()
_attached = 0


def attached(call: Callable[..., Result]) -> Callable[..., Result]:
    """`call`, to be run once by a thread of the backend; the end of the process waits until it has been."""
    global _attached
    with _lock:
        _attached += 1

    def counted(*args: object) -> Result:
        global _attached
        try:
            return call(*args)
        finally:
            with _lock:
                _attached -= 1

    return counted


def settle() -> None:
    """Wait until what was attached has run and gloo's threads stand still; for PATIENCE at most."""
    end, before, steady = time.monotonic() + PATIENCE, None, 0
    while time.monotonic() < end and steady < _STEADY:
        now = _switches()
        steady = steady + 1 if now == before and now is not None and not _attached else 0
        before = now
        time.sleep(_PAUSE)  # without the interpreter's lock, which they may be waiting for


def _switches() -> list[str] | None:
    """How often each of gloo's threads was put aside, in the kernel's words; None while one is running."""
    found = []
    for task in _TASKS.iterdir() if _TASKS.is_dir() else ():
        try:
            if (task / "comm").read_text().strip() != _THREADS:
                continue
            lines = (task / "status").read_text().splitlines()
        except OSError:  # it has ended
            continue
        if any(line.startswith("State:") and "R" in line.split() for line in lines):
            return None
        found += [f"{task.name} {line}" for line in lines if "ctxt_switches" in line]
    return sorted(found)


atexit.register(settle)
