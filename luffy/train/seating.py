"""The sequences of a step at their seats: read and seated a step ahead, beside the computation.

Every rank reads the whole batch (token ids are small) and decides the same seats; no rank sends anything. Ranks compare
one digest before the step, in the place of the lengths that they would otherwise gather.

What seats are decided from may change between steps (a predictor is refreshed, experts move). `decide_anew` then throws
away what was decided ahead, so that the seats of a step depend on the state after the step before it, and on nothing
else: a resumed run takes the same ones.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch

from luffy.comm import Comm
from luffy.data.loader import Sequence as TokenSequence
from luffy.errors import RankMismatchError
from luffy.seats.layout import Seating, SeatLayout, as_read
from luffy.seats.seater import Seats
from luffy.train.batching import StepTable, count_labels, gather_step


@dataclass(frozen=True)
class SeatedStep:
    """One optimizer step as this rank takes part in it. micro_batches: its sequences. table: of all ranks.

    Set where seats are decided: batch, all sequences in reading order, and their seating; moved_share: of the sequences
    that sit elsewhere than where they were read; seconds: that deciding took; exposed_seconds: that the step waited.
    """

    micro_batches: list[list[TokenSequence]]
    table: StepTable
    batch: list[TokenSequence] | None = None
    seating: Seating | None = None
    moved_share: float = 0.0
    seconds: float = 0.0
    exposed_seconds: float = 0.0


class StepReader:
    """Reads steps. read(loader_step, rank, world_size): sequences of a micro-batch as the loader deals them.

    seats: None where each rank computes what it reads.
    """

    def __init__(
        self,
        read: Callable[[int, int, int], list[TokenSequence]],
        layout: SeatLayout,
        comm: Comm,
        seats: Seats | None = None,
    ) -> None:
        self.read, self.layout, self.comm, self.seats = read, layout, comm, seats
        self.reads_per_step = layout.num_micro_batches  # of the loader, however a step is divided
        self._thread: ThreadPoolExecutor | None = None
        self._reading: dict[int, Future[list[TokenSequence]]] = {}
        self._seating: dict[int, Future[tuple[Seating, float]]] = {}

    def use(self, seats: Seats | None, layout: SeatLayout | None = None) -> None:
        """From the next step on, seats of another kind, or another number of micro-batches."""
        self.seats, self.layout = seats, layout or self.layout
        self.decide_anew()

    def whole(self, step: int) -> list[TokenSequence]:
        """All sequences of a step, in reading order."""
        n = self.reads_per_step
        return [s for m in range(n) for s in self.read(step * n + m, 0, 1)]

    def take(self, step: int) -> SeatedStep:
        """The sequences of step `step`, counted from 0; every rank calls it, and the next step begins to be read.

        Raises RankMismatchError where ranks read other sequences or decided other seats.
        """
        mesh, A = self.comm.mesh, self.layout.num_micro_batches
        if self.seats is None:
            mine = [self.read(step * A + m, mesh.rank, mesh.world_size) for m in range(A)]
            return SeatedStep(mine, gather_step(mine, self.comm))
        begin = time.perf_counter()
        self._begin(step)
        batch, (seating, seconds) = self._reading.pop(step).result(), self._seating.pop(step).result()
        exposed = time.perf_counter() - begin
        self._begin(step + 1)
        table = table_of(batch, seating, self.layout)
        self._compare(table, step)
        mine = [[batch[i] for i in seating.of(mesh.rank, m)] for m in range(A)]
        moved = float((seating.rank != as_read(len(batch), self.layout).rank).mean()) if len(batch) else 0.0
        return SeatedStep(mine, table, batch, seating, moved, seconds, exposed)

    def decide_anew(self) -> None:
        """Seats that were decided ahead no longer hold."""
        self._seating.clear()

    def close(self) -> None:
        """End the thread that reads ahead; another `take` would begin a new one."""
        if self._thread is not None:
            self._thread.shutdown(wait=True, cancel_futures=True)
        self._thread, self._reading, self._seating = None, {}, {}

    def _begin(self, step: int) -> None:
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, "seats")
        if step not in self._reading:
            self._reading = {step: self._thread.submit(self.whole, step)}
        if step not in self._seating:
            self._seating = {step: self._thread.submit(self._seat, self._reading[step])}

    def _seat(self, reading: Future[list[TokenSequence]]) -> tuple[Seating, float]:
        assert self.seats is not None
        batch, begin = reading.result(), time.perf_counter()  # read before by the same thread: no wait
        seating = self.seats.seat(batch, self.layout)
        return seating, time.perf_counter() - begin

    def _compare(self, table: StepTable, step: int) -> None:
        mine = torch.tensor([table.digest()], dtype=torch.int64, device=self.comm.mesh.device)
        digests = self.comm.all_gather_world(mine).flatten().tolist()
        if len(set(digests)) > 1:
            common = max(set(digests), key=lambda d: (digests.count(d), -digests.index(d)))
            odd = [r for r, d in enumerate(digests) if d != common]
            raise RankMismatchError(
                f"step {step + 1}: ranks {odd} read other sequences, or seated them otherwise, than the other "
                f"{len(digests) - len(odd)} ranks; give all ranks the same --data and version of luffy"
            )


def table_of(batch: Sequence[TokenSequence], seating: Seating, layout: SeatLayout) -> StepTable:
    """The table of a step whose sequences sit as `seating` says."""
    lengths = np.array([len(s.tokens) for s in batch], dtype=np.int64)
    micros = range(layout.num_micro_batches)
    at = [[seating.of(r, m) for r in range(layout.world_size)] for m in micros]
    topics = None if seating.topic is None else [[seating.topic[own] for own in ranks] for ranks in at]
    of_ranks = [[lengths[own] for own in ranks] for ranks in at]
    return StepTable(of_ranks, count_labels(batch), topics, seating.num_topics)
