"""A second count of bytes, at torch's dispatcher, to check the first.

The dispatcher sees every collective, from Python, from autograd and from C++ alike, but asking it about each operation
of a model slows the model down. So `--audit-bytes` counts both ways, and a step on which they differ stops the run.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from benchmarks.peers.counting import ByteCounter, resolve_group

# In the second step DistributedDataParallel tells all ranks, once and from C++, the order of its buckets: a few
# integers that neither the counter nor Luffy's own meter counts. Nothing else here broadcasts during a step.
_SILENT = ("barrier", "monitored_barrier_", "broadcast_")
_GROUP = ("process_group", "group_name", "group")


def _group(arguments: dict[str, Any]) -> dist.ProcessGroup:
    value = next(arguments[name] for name in _GROUP if name in arguments)
    return dist.ProcessGroup.unbox(value) if isinstance(value, torch.ScriptObject) else resolve_group(value)


def num_bytes_sent(name: str, arguments: dict[str, Any]) -> int:
    """Bytes that this rank sends in one operation of the namespaces c10d and _c10d_functional."""
    group = _group(arguments)
    n, me = group.size(), group.rank()
    given = next(arguments[key] for key in ("input_tensors", "input_tensor", "tensors", "input") if key in arguments)
    tensors = [leaf for leaf in tree_leaves(given) if isinstance(leaf, Tensor)]
    num_bytes = sum(t.nbytes for t in tensors)
    if name.startswith(("alltoall_base", "all_to_all_single")):
        splits = arguments.get("input_split_sizes")
        (rows,) = tensors
        kept = splits[me] if splits else rows.shape[0] // n
        return num_bytes - kept * rows.shape[1:].numel() * rows.element_size()
    if "reduce_scatter" in name:
        return num_bytes * (n - 1) // n
    if name.startswith(("allreduce", "all_reduce")):
        return 2 * (n - 1) * num_bytes // n
    if "gather" in name:
        return (n - 1) * num_bytes
    raise RuntimeError(f"the byte audit does not know {name}; teach benchmarks/peers/counting.py and audit.py of it")


class Audit(TorchDispatchMode):
    """Around a step: raises RuntimeError if `counter` missed anything, or counted what was not sent."""

    def __init__(self, counter: ByteCounter) -> None:
        super().__init__()
        self._counter, self._seen, self._before = counter, 0, 0

    def __enter__(self) -> Audit:
        self._seen, self._before = 0, self._counter.total
        super().__enter__()
        return self

    def __exit__(self, exc_type: Any, exc: Any, trace: Any) -> None:
        super().__exit__(exc_type, exc, trace)
        counted = self._counter.total - self._before
        if exc_type is None and counted != self._seen:
            raise RuntimeError(f"{counted} bytes were counted where {self._seen} were sent")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        namespace, name = func.namespace, func._schema.name.split("::")[1]
        if namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd") and name not in _SILENT:
            names = [argument.name for argument in func._schema.arguments]
            if not set(_GROUP).isdisjoint(names):  # others wait or wrap
                self._seen += num_bytes_sent(name, dict(zip(names, args, strict=False)) | kwargs)
        return func(*args, **kwargs)
