"""Restarts by itself (`--max-restarts`): the next attempt continues from the newest sound checkpoint.

At the same number of ranks first, so that it ends as if nothing had happened, to the bit. Where an attempt ends without
a new checkpoint, the cause may be in the machine (a GPU that is lost): the next one takes fewer ranks, the most below
that the options allow, but not fewer than `--min-ranks`.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luffy.errors import UserError
from luffy.train.checkpoint_files import list_checkpoints
from luffy.train.options import TrainOptions


@dataclass
class Restarts:
    """What `launch` asks when ranks were lost."""

    options: TrainOptions
    newest: str | None = field(init=False)
    without_progress: int = 0

    def __post_init__(self) -> None:
        self.newest = self._newest() if self.options.resume else None

    def _newest(self) -> str | None:
        found = list_checkpoints(Path(self.options.out) / "checkpoints")
        return found[-1].name if found else None

    def __call__(self, attempt: int, ranks: int, why: str) -> tuple[tuple[Any, ...], int] | None:
        if attempt >= self.options.max_restarts:
            return None
        newest = self._newest()
        self.without_progress = 0 if newest != self.newest else self.without_progress + 1
        self.newest = newest
        if self.without_progress > 1:
            ranks = self.fewer(ranks)
        where = f"from {newest}" if newest else "from the beginning"
        print(
            f"luffy: {why.splitlines()[-1] if why.count(chr(10)) else why}\n"
            f"luffy: restart {attempt + 1} of {self.options.max_restarts}, on {ranks} ranks, {where}",
            file=sys.stderr,
            flush=True,
        )
        return (self.options,), ranks

    def fewer(self, ranks: int) -> int:
        """The next smaller number of ranks that the options allow; `ranks` where there is none."""
        least = self.options.min_ranks or self.options.ranks
        for smaller in range(ranks - 1, least - 1, -1):
            try:
                self.options.check_world(smaller)
            except UserError:
                continue
            return smaller
        return ranks
