"""A library model's configuration as Luffy's planner, metrics and checkpoints know models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luffy.config import ModelConfig, RouterConfig
from luffy.hf.attention import longest_sequence
from luffy.hf.families import Family


@dataclass(frozen=True)
class LibraryConfig(ModelConfig):
    """A ModelConfig whose blocks without experts are listed; it describes a model, and builds none."""

    dense_layers: tuple[int, ...] = ()

    def is_moe_layer(self, layer: int) -> bool:
        return layer not in self.dense_layers

    def to_dict(self) -> dict[str, Any]:
        return super().to_dict() | {"dense_layers": list(self.dense_layers)}


def describe(config: Any, family: Family, dense_layers: tuple[int, ...], **router: Any) -> LibraryConfig:
    """The parts of a library configuration that matter here. router: further settings of the RouterConfig."""
    heads = config.num_attention_heads
    return LibraryConfig(
        name=config.model_type,
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        num_layers=config.num_hidden_layers,
        num_heads=heads if config.hidden_size % heads == 0 and config.hidden_size // heads % 2 == 0 else 1,
        dense_hidden_size=getattr(config, "intermediate_size", config.hidden_size),
        expert_hidden_size=getattr(config, family.expert_width),
        max_sequence_length=longest_sequence(config),
        position="rope",
        norm="rmsnorm",
        activation="swiglu",
        bias=family.biases,
        tie_embeddings=config.tie_word_embeddings,
        num_shared_experts=getattr(config, "n_shared_experts", 0) if family.shared else 0,
        norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        router=RouterConfig(
            num_experts=getattr(config, family.num_experts),
            top_k=getattr(config, family.top_k),
            score=family.score,
            normalize_topk=family.normalizes(config),
            **({"balance_loss": 0.0, "z_loss": 0.0} | router),
        ),
        dense_layers=dense_layers,
    )
