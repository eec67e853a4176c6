"""`logs/rank-N.log` in a run's folder: what each rank did and how it ended, with times.

Lines of C++ libraries (gloo, NCCL, torch's stores) go there as well instead of onto the terminal, and so do the stacks
of a crash; what a person should read comes through Python's `sys.stderr`, which stays where it was.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any, TextIO

LOGS_DIR = "logs"
_log: TextIO | None = None


def log_path(out: Path | str, rank: int | str) -> Path:
    return Path(out) / LOGS_DIR / f"rank-{rank}.log"


def open_log(out: Path | str, rank: int) -> None:
    """Begin, or continue, this rank's log. A disk that does not take it is no reason to stop."""
    global _log
    path = log_path(out, rank)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if _log is not None:
            _log.close()
        _log = open(path, "a", encoding="utf-8", buffering=1)  # noqa: SIM115
    except OSError:
        return
    # Python's own stream keeps the terminal; descriptor 2, which C++ writes to, becomes the log.
    sys.stderr.flush()
    terminal: Any = os.fdopen(os.dup(2), "w", encoding=sys.stderr.encoding, errors="replace", buffering=1)
    os.dup2(_log.fileno(), 2)
    sys.stderr = terminal
    faulthandler.enable(file=_log)
    say(f"rank {rank} on {platform.node()}, process {os.getpid()}")


def say(text: str) -> None:
    """A line, or several, in the log of this rank; nothing where there is none (ranks of a test)."""
    if _log is not None:
        with contextlib.suppress(OSError, ValueError):
            _log.write(time.strftime("%Y-%m-%d %H:%M:%S ") + text.rstrip("\n") + "\n")


def tell(text: str) -> None:
    """A line for the person who watches, and for the log."""
    say(text)
    print(f"luffy: {text}", file=sys.stderr, flush=True)


def dump_stacks() -> None:
    """The stacks of all threads, into the log."""
    if _log is not None:
        with contextlib.suppress(OSError, ValueError):
            faulthandler.dump_traceback(file=_log, all_threads=True)
