"""A rank's `state_dict` holds its own experts, under the names that every rank uses: this keeps it from other ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from luffy.comm import Mesh
from luffy.errors import UserError

KEY = "expert_parallel_rank"


def mark_state(layer: nn.Module, mesh: Mesh) -> None:
    """Have `layer.state_dict()` say whose experts it holds, and `load_state_dict` refuse those of another rank."""

    def say(module: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state[prefix + KEY] = torch.tensor([mesh.ep_rank, mesh.ep_size])

    def check(module: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        has = [name for name in state if name.startswith(prefix)]
        found = state.pop(prefix + KEY, None)
        if not has or (found is None and mesh.ep_size == 1):
            return
        whose = None if found is None else tuple(found.tolist())
        if whose != (mesh.ep_rank, mesh.ep_size):
            held = "of an unknown rank" if whose is None else f"of rank {whose[0]} of {whose[1]}"
            raise UserError(
                f"load_state_dict: {prefix.rstrip('.') or 'the layer'} has the experts of rank {mesh.ep_rank} of "
                f"{mesh.ep_size}, and this state_dict those {held}; keep a model with luffy.save_checkpoint, or "
                "luffy.save_weights, and it loads at any number of ranks (docs/own_model.md)"
            )

    layer.register_state_dict_post_hook(say)
    layer.register_load_state_dict_pre_hook(check)
