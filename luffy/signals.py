"""Handlers of signals for the length of a block."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any


@contextmanager
def handled(numbers: Iterable[int], handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """`handler` takes the signals `numbers` in this block; what took them before does so again after it.

    Only the main thread may call it.
    """
    before = {number: signal.signal(number, handler) for number in numbers}
    try:
        yield
    finally:
        for number, old in before.items():
            signal.signal(number, old)
