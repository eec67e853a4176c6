"""Whose a parameter is: of every rank alike, or of one rank of an expert-parallel group.

Known from the module that holds it, never from its name: a user may call any module `experts`.
"""

from __future__ import annotations

from torch import nn

from luffy.comm import Mesh
from luffy.comm.alike import check_alike, check_weights
from luffy.comm.sharding import is_sharded
from luffy.compose import Runtime
from luffy.errors import UserError
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


def runtimes_of(model: nn.Module, caller: str) -> list[Runtime]:
    """Of the MoE layers of `model`, each once. UserError, which names the caller, where it has none."""
    found = {id(m.runtime): m.runtime for m in model.modules() if isinstance(m, MoELayer)}
    if not found:
        raise UserError(f"{caller}: {type(model).__name__} holds no luffy.MoEBlock")
    return list(found.values())


def check_model(model: nn.Module, mesh: Mesh) -> None:
    """RanksDifferError where ranks hold other layers, or other weights, than each other. Every rank calls it.

    Sharded weights have no copies to compare.
    """
    layers = {n: m for n, m in model.named_modules() if isinstance(m, MoELayer)}
    facts = {
        f"{n or 'the layer'}": (m.router.config, m.runtime.recipe, m.slot_of_expert.tolist()) for n, m in layers.items()
    }
    check_alike(facts, mesh.device)
    experts = expert_parameters(model)
    named = [(n, p) for n, p in model.named_parameters() if not is_sharded(p)]
    own = [(n, p) for n, p in named if n in experts]
    check_weights([(n, p) for n, p in named if n not in experts], own, mesh.ep_rank, mesh.device)
