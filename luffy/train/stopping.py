"""Being asked to stop: a rank finishes its step, saves, and ends with a status that says why.

SIGTERM (batch systems, `kill`), SIGUSR1 (Slurm's `--signal`) and Ctrl-C set a flag here. Ranks agree on it once a step,
together with their other notes, since a signal reaches them at different moments and all must stop after the same step.
Outside the loop of steps there is nothing to finish, and the rank ends at once.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

from luffy.errors import StoppedError

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)
# A terminal and a launcher may both pass one Ctrl-C on; what comes later is a second one.
SAME_SECONDS = 1.0

_requested = 0
_since = 0.0
_in_loop = False


def install() -> None:
    """Listen, in this rank's process. Ctrl-C is left alone where the launcher said so."""
    global _requested
    _requested = 0
    if threading.current_thread() is not threading.main_thread():
        return
    for number in SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, _note)


def _note(number: int, _: FrameType | None) -> None:
    global _requested, _since
    now = time.monotonic()
    if number == signal.SIGINT and _requested == signal.SIGINT and now - _since > SAME_SECONDS:
        os._exit(128 + number)
    if not _requested:
        _requested, _since = number, now
    if not _in_loop:
        raise StoppedError(number, "stopped before or after its steps; add --resume to continue")


def requested() -> int:
    """The signal that this rank was asked to stop by; 0 where nobody asked."""
    return _requested


@contextmanager
def at_step_ends() -> Iterator[None]:
    """In this block requests wait for the end of the step: see `requested`."""
    global _in_loop
    if _requested:
        raise StoppedError(_requested, "stopped before its first step; add --resume to continue")
    _in_loop = True
    try:
        yield
    finally:
        _in_loop = False


def name_of(number: int) -> str:
    return "Ctrl-C" if number == signal.SIGINT else signal.Signals(number).name
