"""Whose a parameter is: of every rank alike, or of one rank of an expert-parallel group.

Known from the module that holds it, never from its name: a user may call any module `experts`.
"""

from __future__ import annotations

from torch import nn

from luffy.model.moe_layer import MoELayer


def expert_parameters(model: nn.Module, remove_duplicate: bool = True) -> dict[str, MoELayer]:
    """Names of the parameters that are stacked over a rank's own experts, and the layer that each belongs to.

    Every rank of an expert-parallel group has other rows of them; all other parameters are replicated. The names are
    those of `model.named_parameters(remove_duplicate=remove_duplicate)`.
    """
    return {
        f"{prefix}.{name}" if prefix else name: layer
        for prefix, layer in model.named_modules(remove_duplicate=remove_duplicate)
        if isinstance(layer, MoELayer)
        for name, p in layer.named_parameters(remove_duplicate=remove_duplicate)
        if any(p is q for q in layer.experts.parameters())
    }
