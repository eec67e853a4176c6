"""Hugging Face models in, trained with Luffy, Hugging Face models out. docs/huggingface.md says what works.

Names are imported when they are first used, so that a command line that needs no transformers does not wait for it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from luffy.hf.adapters import save_adapter
    from luffy.hf.causal_lm import CausalLM
    from luffy.hf.families import FAMILIES, Family, family_of, register
    from luffy.hf.loading import load
    from luffy.hf.model import ParallelModel, parallelize
    from luffy.hf.saving import save_pretrained
    from luffy.hf.trainer import trainer_of

_HOMES = {
    "CausalLM": "causal_lm",
    "FAMILIES": "families",
    "Family": "families",
    "family_of": "families",
    "register": "families",
    "load": "loading",
    "ParallelModel": "model",
    "parallelize": "model",
    "save_adapter": "adapters",
    "save_pretrained": "saving",
    "trainer_of": "trainer",
}
__all__ = [
    "FAMILIES", "CausalLM", "Family", "ParallelModel", "family_of", "load", "parallelize", "register",
    "save_adapter", "save_pretrained", "trainer_of",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"luffy.hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted(__all__)
