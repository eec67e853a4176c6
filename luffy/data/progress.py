"""How long work reports itself: a callback, so that the library prints nothing and any front end can."""

from typing import Protocol


class Progress(Protocol):
    """Called with the documents done, their total (None: not known yet), and what is being done."""

    def __call__(self, done: int, total: int | None, description: str, /) -> None: ...


def no_progress(done: int, total: int | None, description: str, /) -> None:
    """Report nothing."""
