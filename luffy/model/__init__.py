"""The model: blocks that map a TokenBatch to a TokenBatch, and the one MoE layer."""

from luffy.compose import Runtime
from luffy.model.moe_layer import MoELayer
from luffy.model.transformer import MicroBatch, ModelOutput, Transformer, build_model, is_expert

__all__ = ["MicroBatch", "MoELayer", "ModelOutput", "Runtime", "Transformer", "build_model", "is_expert"]
