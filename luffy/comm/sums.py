"""Sums over ranks, of the gradients that every rank makes of the same weights, and what they cost on the wire.

    model       an all-reduce of the tensor as it is
    bfloat16    an all-reduce in bfloat16: half of the bytes, each addition rounded
    int8        8.5 bits a value: blocks of 32 integers with a scale each, summed in float32

Integers with scales cannot be added up on the way, so `int8` does in two steps what an all-reduce does inside: every
rank sends each other one its part of the tensor, coded; adds up, in float32, the parts that it receives; and sends
the sum, coded again, to all. It moves as many values as a ring does. All ranks decode the same bytes, so what is the
same on all ranks stays the same, to the bit. A value is off by at most m / 250 of every rank's term and of the sum, m
being the largest of its block there. (Low-bit sums of gradients: QSGD, arXiv 1610.02132, whose rounding is at random;
two-step sums of coded blocks: ZeRO++, arXiv 2306.10209.)

Sums have a process group of their own where they take two steps, since the second must not stand in the way of
whatever else the ranks exchange in the meantime. The caller does not wait: over gloo a thread does, in the order in
which sums were asked for; over NCCL a stream.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from luffy.comm.collectives import Comm, all_gather_flat
from luffy.comm.ending import attached
from luffy.kernels.wire_rows import decode_rows, encode_rows
from luffy.wire_format import SUM_FORMATS, row_num_bytes

_WIDTH = 1024  # values of a row, as which a flat tensor is coded; a multiple of a block


class GradientSums:
    """Sums over `ranks` of the world, those of `group`, in one of SUM_FORMATS. All of them make one."""

    def __init__(self, comm: Comm, group: dist.ProcessGroup, ranks: Sequence[int], form: str) -> None:
        if form not in SUM_FORMATS:
            raise ValueError(f"no format '{form}' of sums: one of {', '.join(SUM_FORMATS)}")
        self.comm, self.group, self.ranks, self.form = comm, group, list(ranks), form
        self._stream: torch.cuda.Stream | None = None
        self._asked: queue.SimpleQueue[Callable[[], None]] | None = None
        if form == "int8":
            backend = dist.get_backend(group)
            ranks_of_job = dist.get_process_group_ranks(group)
            self.group = dist.new_group(ranks_of_job, backend=backend, use_local_synchronization=True)
            if comm.mesh.device.type == "cuda":
                self._stream = torch.cuda.Stream(comm.mesh.device)
            if backend != "nccl":
                self._asked = queue.SimpleQueue()
                # A daemon: a rank that fails must be able to end while the others' answers are still awaited.
                threading.Thread(target=_work_off, args=(self._asked,), name="sums", daemon=True).start()

    def start(self, tensor: Tensor) -> torch.futures.Future[Tensor]:
        """Begin to sum `tensor`, contiguous, in place; the future is done when it holds the sum."""
        if self.form == "int8":
            return self._start_coded(tensor)
        sent = tensor.to(torch.bfloat16) if self.form == "bfloat16" else tensor
        self.comm.meter.all_reduce("gradients", self.ranks, sent.nbytes)
        future = dist.all_reduce(sent, group=self.group, async_op=True).get_future()

        def finish(done: torch.futures.Future[Any]) -> Tensor:
            value = done.value()[0]  # asked for even where it is `tensor` itself: this raises if the sum failed
            return value if sent is tensor else tensor.copy_(value)

        return future.then(attached(finish))

    # ---------------------------------------------------------------- int8

    def _start_coded(self, tensor: Tensor) -> torch.futures.Future[Tensor]:
        n = len(self.ranks)
        rows = -(-tensor.numel() // (_WIDTH * n))  # of each rank's part
        for _ in range(2):  # the parts, and then the sums
            self.comm.meter.all_gather("gradients", self.ranks, rows * row_num_bytes("int8", _WIDTH, 0))
        stream = self._stream
        if stream is not None:
            stream.wait_stream(torch.cuda.current_stream())
            tensor.record_stream(stream)
        future: torch.futures.Future[Any] = torch.futures.Future(devices=None if stream is None else [stream.device])

        def work() -> None:
            with torch.no_grad(), torch.cuda.stream(stream):
                try:
                    future.set_result(self._sum(tensor, rows))
                except Exception as error:  # to be raised by whoever waits
                    future.set_exception(error)

        if self._asked is None:
            work()
        else:
            self._asked.put(work)
        # `then`: an error that was set shows as itself only here, and not to DistributedDataParallel.
        return future.then(attached(lambda done: done.value()))

    def _sum(self, tensor: Tensor, rows: int) -> Tensor:
        n, flat = len(self.ranks), tensor.view(-1)
        padded = F.pad(flat, (0, rows * n * _WIDTH - flat.numel()))
        parts = encode_rows(padded.view(rows * n, _WIDTH), None, "int8")
        received = torch.empty_like(parts)
        dist.all_to_all_single(received, parts, group=self.group, async_op=True).wait()
        mine = decode_rows(received, _WIDTH, "int8", torch.float32).view(n, rows, _WIDTH).sum(0)
        mine = encode_rows(mine, None, "int8")
        all_gather_flat(parts.view(-1), mine.view(-1), group=self.group, async_op=True).wait()
        total = decode_rows(parts, _WIDTH, "int8", torch.float32)
        flat.copy_(total.view(-1)[: flat.numel()])
        return tensor


def _work_off(asked: queue.SimpleQueue[Callable[[], None]]) -> None:
    while True:
        asked.get()()
