"""Bytes that leave a rank, for programs that know nothing of Luffy's meter.

`ByteCounter.install` puts a counting shell around the collectives of `torch.distributed`, in every module that holds
one of them by name. Only the outermost call counts, so a collective that is built upon
another is not counted twice; calls cost the peer a few microseconds, since nothing else is intercepted.

Volumes are those of the traffic meter (luffy/comm/meter.py), of whatever algorithm the backend picks:

    all-to-all       rows for other ranks; what a rank keeps for itself never left it
    all-gather       the rank's part, once for each other rank
    reduce-scatter   (n-1)/n of the input
    all-reduce       2 (n-1)/n of the tensor
    broadcast        the tensor, once for each other rank, by its source

They are sorted into the directions of `metrics.jsonl`. Floating-point all-to-alls carry token rows: of an MoE layer the
first of a forward pass is its dispatch, the second its combine, and in a backward pass the other way round. All other
floating-point collectives synchronise weights and gradients; integers, and what `charging` is around, are control.
"""

from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from luffy.report.runs import BYTE_KINDS

# Bytes that this rank sends in a call of these arguments.
Volume = Callable[[dict[str, Any], dist.ProcessGroup], int]


def resolve_group(group: Any) -> dist.ProcessGroup:
    """The process group that torch's many spellings of one mean."""
    if isinstance(group, str):
        return dist.distributed_c10d._resolve_process_group(group)
    if isinstance(group, DeviceMesh):
        return group.get_group()
    if isinstance(group, tuple):
        return group[0].get_group(group[1])
    return dist.group.WORLD if group is None else group


def _input(arguments: dict[str, Any]) -> Tensor:
    """What the rank gives to a collective, whatever that parameter is called."""
    for name in ("input_tensor", "input", "tensor", "self"):
        if isinstance(arguments.get(name), Tensor):
            return arguments[name]
    raise TypeError(f"no tensor among {sorted(arguments)}")


def _gathered(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    return (group.size() - 1) * _input(arguments).nbytes


def _scattered(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    return (group.size() - 1) * _input(arguments).nbytes // group.size()


def _reduced(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    return 2 * (group.size() - 1) * _input(arguments).nbytes // group.size()


def _broadcast(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    source = arguments.get("src")
    mine = source == dist.get_rank() or arguments.get("group_src") == group.rank()
    return (group.size() - 1) * _input(arguments).nbytes if mine else 0


def rows_to_others(rows: int, like: Tensor, splits: list[int] | None, group: dist.ProcessGroup) -> int:
    """Bytes of an all-to-all of `rows`, each as those of `like`, that go to other ranks; None splits evenly."""
    kept = splits[group.rank()] if splits else rows // group.size()
    return (rows - kept) * like.shape[1:].numel() * like.element_size()


def _swapped(arguments: dict[str, Any], group: dist.ProcessGroup) -> int:
    tensor = _input(arguments)
    return rows_to_others(tensor.shape[0], tensor, arguments.get("input_split_sizes"), group)


# By name; torch renames some between releases, and keeps the old name for a while.
_PLAIN: dict[str, Volume] = {
    "all_reduce": _reduced,
    "all_gather": _gathered,
    "all_gather_into_tensor": _gathered,
    "all_gather_single": _gathered,
    "reduce_scatter_tensor": _scattered,
    "reduce_scatter_single": _scattered,
    "all_to_all_single": _swapped,
    "broadcast": _broadcast,
}
_FUNCTIONAL: dict[str, Volume] = {
    "all_reduce": _reduced,
    "all_gather_tensor": _gathered,
    "all_gather_single": _gathered,
    "reduce_scatter_tensor": _scattered,
    "reduce_scatter_single": _scattered,
    "all_to_all_single": _swapped,
    "all_to_all_single_autograd": _swapped,
}
_FORWARD, _BACKWARD = ("dispatch", "combine"), ("combine_backward", "dispatch_backward")


class ByteCounter:
    """Counts what this rank sends, by the kinds of `metrics.jsonl`."""

    def __init__(self) -> None:
        self._bytes = dict.fromkeys(BYTE_KINDS, 0)
        self.total = 0  # never reset
        self._order, self._swaps = _FORWARD, 0
        self._charged_to: str | None = None
        self._local = threading.local()

    # ------------------------------------------------------------ what the trainer says

    def begin(self, backward: bool) -> None:
        """A forward pass begins, or a backward pass: the next all-to-all is its first."""
        self._order, self._swaps = (_BACKWARD if backward else _FORWARD), 0

    @contextlib.contextmanager
    def charging(self, kind: str) -> Iterator[None]:
        """Within, count everything as `kind`."""
        before, self._charged_to = self._charged_to, kind
        try:
            yield
        finally:
            self._charged_to = before

    def take(self) -> dict[str, int]:
        """Bytes by kind since the last call."""
        taken, self._bytes = self._bytes, dict.fromkeys(BYTE_KINDS, 0)
        return taken

    def add(self, num_bytes: int, dtype: torch.dtype, swap: bool = False) -> None:
        if self._charged_to is not None:
            kind = self._charged_to
        elif not dtype.is_floating_point:
            kind = "control"
        elif swap:
            kind = self._order[self._swaps % 2]
            self._swaps += 1
        else:
            kind = "gradients"
        self._bytes[kind] += num_bytes
        self.total += num_bytes

    # ------------------------------------------------------------ shells around collectives

    def install(self) -> ByteCounter:
        """Count from now on, in this process, for good. Peers imported later find the shells, earlier ones get them."""
        shells: dict[int, Any] = {}
        for module, volumes in ((dist.distributed_c10d, _PLAIN), (functional, _FUNCTIONAL)):
            for name, volume in volumes.items():
                original = getattr(module, name, None)
                if original is not None and id(original) not in shells:
                    shells[id(original)] = self._shell(original, volume, differentiates=module is functional)
        for module in list(sys.modules.values()):
            for name, value in list(getattr(module, "__dict__", {}).items()):
                if id(value) in shells and callable(value):
                    setattr(module, name, shells[id(value)])
        return self

    def _shell(self, original: Callable[..., Any], volume: Volume, differentiates: bool) -> Callable[..., Any]:
        signature = inspect.signature(original)

        @functools.wraps(original)
        def counted(*args: Any, **kwargs: Any) -> Any:
            if getattr(self._local, "inside", False):
                return original(*args, **kwargs)
            arguments = signature.bind(*args, **kwargs).arguments
            group, sent = resolve_group(arguments.get("group")), _input(arguments)
            if group.rank() >= 0:
                self.add(volume(arguments, group), sent.dtype, volume is _swapped)
            if differentiates and volume is _swapped and sent.requires_grad and torch.is_grad_enabled():
                self._count_gradient(arguments, sent, group)
            self._local.inside = True
            try:
                return original(*args, **kwargs)
            finally:
                self._local.inside = False

        return counted

    def _count_gradient(self, arguments: dict[str, Any], sent: Tensor, group: dist.ProcessGroup) -> None:
        """A differentiable all-to-all sends its gradient the other way, from inside autograd, where no shell is."""
        splits, dtype = arguments.get("output_split_sizes"), sent.dtype
        num_bytes = rows_to_others(sum(splits) if splits else sent.shape[0], sent, splits, group)

        def count(_: Tensor) -> None:
            self.add(num_bytes, dtype, swap=True)

        sent.register_hook(count)
