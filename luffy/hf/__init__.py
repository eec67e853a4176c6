"""Hugging Face models in, trained with Luffy, Hugging Face models out. docs/huggingface.md says what works.

Names are imported when they are first used, so that a command line that needs no transformers does not wait for it.
"""

import importlib
from typing import Any

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
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"luffy.hf.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return [*globals(), *_HOMES]
