"""The MoE layer that a ModelConfig describes."""

from __future__ import annotations

from luffy.compose import Runtime
from luffy.config import ModelConfig
from luffy.model.experts import GroupedExperts
from luffy.model.latent import LatentRows
from luffy.model.layers import FeedForward
from luffy.model.moe_layer import MoELayer
from luffy.model.router import Router


def moe_layer(config: ModelConfig, runtime: Runtime, layer: int) -> MoELayer:
    """Layer `layer` of a model of `config`, its weights not initialised; UserError if experts cannot be divided."""
    ep_size = runtime.comm.mesh.ep_size
    config.check_ranks(ep_size)
    shared = config.num_shared_experts * config.expert_hidden_size
    return MoELayer(
        runtime,
        layer,
        router=Router(config.router, config.hidden_size),
        experts=GroupedExperts(config, config.router.num_experts // ep_size),
        shared_experts=FeedForward(config, shared) if shared else None,
        latent=LatentRows(config.hidden_size, config.latent_size) if config.latent_size else None,
        layer_of_moe=sum(config.is_moe_layer(i) for i in range(layer)),
        causal=config.causal,
    )
