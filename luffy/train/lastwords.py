"""How a rank says why it ends: to its launcher's folder, or to the terminal where the launcher is torchrun."""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import NoReturn

from luffy.train.ranklog import say

_folder: Path | None = None


def begin(folder: str | None) -> None:
    """folder: where the launcher looks; None where there is none that does."""
    global _folder
    _folder = None if folder is None else Path(folder)


def has_launcher() -> bool:
    return _folder is not None


def leave_word(kind: str, text: str, line: str | None = None) -> None:
    """kind: user, stopped, late or crash. line: for the terminal, where no launcher reads the text."""
    say(f"{kind}: {text}")
    if _folder is None:
        if line is not None:
            print(f"luffy: {line}", file=sys.stderr, flush=True)
        return
    path = _folder / f"{kind}-{os.environ.get('RANK', '0')}"
    with contextlib.suppress(OSError):
        path.with_suffix(".part").write_text(text, encoding="utf-8")
        path.with_suffix(".part").rename(path)


def end_process(status: int) -> NoReturn:
    """End this rank at once: waiting for peers that are stuck in a collective would be the hang itself."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)
