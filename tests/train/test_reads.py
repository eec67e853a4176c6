"""Seats are decided ahead by a thread of their own, which reads from the loader that the step reads from."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch

from luffy.comm import build_mesh
from luffy.testing import run_ranks
from luffy.train.options import TrainOptions
from luffy.train.steps import Steps
from luffy.train.trainer import Trainer


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


def threads_left(rank: int, settings: dict[str, Any]) -> tuple[bool, list[str]]:
    trainer = Trainer(TrainOptions(**settings), build_mesh(torch.device("cpu")))
    began = []
    trainer.reader.decide_anew = lambda: began.append(trainer.reader._thread is not None)  # type: ignore[method-assign]
    trainer.run()
    return any(began), [t.name for t in threading.enumerate() if t.name.startswith("seats")]


def test_a_run_ends_the_thread_that_reads_ahead(small: Any) -> None:
    assert run_ranks(threads_left, 2, small(recipe="luffy", steps=12, checkpoint_every=0)) == [(True, [])] * 2
