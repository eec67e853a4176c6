"""The plain model within a parallel one: its modules by the library's names, without what PEFT puts around them.

Decided by what a module is. Of a copy that PEFT trains in a module's place (`modules_to_save`) it is the copy; of an
adapted module, the one beneath, which holds the adapter once that is merged.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from luffy.errors import UserError
from luffy.hf.model import ParallelModel
from luffy.model.experts import Experts
from luffy.model.moe_layer import MoELayer


def plain_tensors(parallel: ParallelModel) -> dict[str, Tensor]:
    """Parameters and stored buffers by name in the library's own model; a tied one under its first name only."""
    found: dict[str, Tensor] = {}
    seen: set[int] = set()
    for prefix, module in _modules("", parallel.causal_lm):
        tensors = [(n, p) for n, p in module._parameters.items() if p is not None]
        if not isinstance(module, MoELayer):
            kept = ((n, b) for n, b in module._buffers.items() if n not in module._non_persistent_buffers_set)
            tensors += [(n, b) for n, b in kept if b is not None]  # type: ignore[misc]
        for name, tensor in tensors:
            if id(tensor) not in seen:
                seen.add(id(tensor))
                found[parallel.library_name(f"{prefix}{name}")] = tensor
    return found


def _modules(prefix: str, module: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    module = plain_module(module)
    yield prefix, module
    if isinstance(module, Experts):
        return  # adapters of experts are added to their weights when those are asked for
    for name, child in module.named_children():
        yield from _modules(f"{prefix}{name}.", child)


def plain_module(module: Any) -> nn.Module:
    """The library's module in the place of `module`, which may be PEFT's wrapper around one."""
    if hasattr(module, "modules_to_save") and hasattr(module, "original_module"):
        active = [name for name in module.active_adapters if name in module.modules_to_save]
        return plain_module(module.modules_to_save[active[0]] if active else module.original_module)
    if hasattr(module, "token_adapter"):
        module = module.token_adapter
    while hasattr(module, "base_layer"):
        module = module.base_layer
    plain: nn.Module = module
    return plain


def check_all_saved(parallel: ParallelModel, saved: dict[str, Tensor]) -> None:
    """UserError for a trained parameter that no weight of the plain model holds, adapters being merged by now."""
    held = {id(t) for t in saved.values()}
    for module in parallel.modules():
        if getattr(module, "merged", False) is True or isinstance(module, Experts):
            held |= {id(p) for p in module.parameters()}
    lost = [n for n, p in parallel.named_parameters() if p.requires_grad and id(p) not in held]
    if lost:
        raise UserError(
            f"{lost[0]} is trained and has no place in a plain model, so it cannot be saved in one"
            + (f" ({len(lost) - 1} more)" if lost[1:] else "")
        )


def is_tied(parallel: ParallelModel) -> bool:
    """Whether embedding and head are one weight in the plain model, whatever its configuration says."""
    lm = parallel.causal_lm
    first, second = (plain_module(m).weight for m in (lm.get_input_embeddings(), lm.get_output_embeddings()))
    return first is second
