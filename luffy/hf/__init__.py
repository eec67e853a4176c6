"""Hugging Face models in, trained with Luffy, Hugging Face models out. docs/huggingface.md says what works."""

from luffy.hf.families import FAMILIES, Family, family_of, register
from luffy.hf.load import load
from luffy.hf.model import ParallelModel, parallelize
from luffy.hf.save import save_pretrained

__all__ = ["FAMILIES", "Family", "ParallelModel", "family_of", "load", "parallelize", "register", "save_pretrained"]
