"""From text to training sequences.

    corpus (documents in order) -> tokenizer -> token shards on disk -> loader (sequences of a step and rank)

`prepare_corpus` does the first three once and caches the result; `SequenceLoader` deals the sequences.
Nothing here talks to other processes except through the file system: what a rank reads follows from its rank
and the step.
"""

from luffy.data.corpus import Document, ReadTally, iter_documents
from luffy.data.loader import IGNORE_INDEX, MODES, Sequence, SequenceLoader
from luffy.data.masking import mask_for_mlm
from luffy.data.prepare import prepare_corpus
from luffy.data.progress import Progress
from luffy.data.shards import build_shards
from luffy.data.token_corpus import TokenCorpus, TokenSplit, open_corpus
from luffy.data.tokenizer import Tokenizer, train_tokenizer

__all__ = [
    "IGNORE_INDEX",
    "MODES",
    "Document",
    "Progress",
    "ReadTally",
    "Sequence",
    "SequenceLoader",
    "TokenCorpus",
    "TokenSplit",
    "Tokenizer",
    "build_shards",
    "iter_documents",
    "mask_for_mlm",
    "open_corpus",
    "prepare_corpus",
    "train_tokenizer",
]
