"""The model: blocks that map a TokenBatch to a TokenBatch, and the one MoE layer."""

from luffy.compose import Runtime
from luffy.model.moe_layer import MoELayer
from luffy.model.ownership import check_model, expert_parameters
from luffy.model.transformer import MicroBatch, ModelOutput, Transformer, build_model

__all__ = [
    "MicroBatch",
    "MoELayer",
    "ModelOutput",
    "Runtime",
    "Transformer",
    "build_model",
    "check_model",
    "expert_parameters",
]
