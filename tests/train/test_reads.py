"""Seats are decided ahead by a thread of their own, which reads from the loader that the step reads from."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from luffy.train.steps import Steps


class OneOrder:
    """Keeps the order of one epoch, as loaders do, and takes its time."""

    def batch(self, step: int, rank: int, world_size: int) -> list[Any]:
        self.epoch = step
        time.sleep(0.002)
        return [self.epoch]


def test_one_thread_at_a_time_reads_from_a_loader() -> None:
    steps: Any = object.__new__(Steps)
    steps.loader, steps.mask_id, steps._reads = OneOrder(), None, threading.Lock()
    with ThreadPoolExecutor(2) as pool:
        read = list(pool.map(lambda n: steps._read(n, 0, 1), range(40)))
    assert read == [[n] for n in range(40)]
