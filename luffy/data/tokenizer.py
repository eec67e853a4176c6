"""Byte-level BPE: train one on the corpus, or load a `tokenizer.json`.

Byte-pair encoding (Sennrich et al., 2016) on bytes (GPT-2: Radford et al., 2019) has no unknown token, so any
text can be encoded and decoded without loss. The work is done by Hugging Face `tokenizers`; the wrapper here
keeps the few things that training needs and closes the traps of foreign files: truncation and padding that a
saved tokenizer may carry are switched off (a BERT file would silently cut every document at 512 tokens), and
text that happens to spell a special token (`<|endoftext|>` inside a manual) is encoded as plain text rather
than ending the document.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from luffy.errors import UserError

END_OF_TEXT, MASK, PAD = "<|endoftext|>", "<|mask|>", "<|pad|>"
SPECIAL_TOKENS = (END_OF_TEXT, MASK, PAD)  # ids 0, 1, 2 of every tokenizer trained here
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Best first: base models that know several use the first for the end of a document.
_END_NAMES = (
    END_OF_TEXT,
    "<|end_of_text|>",
    "</s>",
    "<eos>",
    "[EOS]",
    "<｜end▁of▁sentence｜>",
    "<|im_end|>",
    "[SEP]",
)
_MASK_NAMES = (MASK, "[MASK]", "<mask>", "<|mdm_mask|>")

# A document is encoded in parts of this many characters, so that one huge document neither fills the memory
# nor occupies a single core. Parts end where a word ends: only a run of white space at the seam may be
# encoded otherwise than it would be in one piece.
PART_CHARACTERS = 1 << 18


@dataclass(frozen=True, eq=False)
class Tokenizer:
    """A frozen tokenizer. `vocab_size` is the largest id plus one; `origin` names it in messages."""

    backend: tokenizers.Tokenizer
    vocab_size: int
    eos_id: int
    mask_id_or_none: int | None
    origin: str = "the trained tokenizer"

    @classmethod
    def from_file(cls, path: str | os.PathLike[str]) -> "Tokenizer":
        """Load a `tokenizer.json` (or the one in a folder). Raises `UserError` naming `--tokenizer`."""
        file = Path(path).expanduser()
        file = file / "tokenizer.json" if file.is_dir() else file
        if not file.is_file():
            raise UserError(f"--tokenizer {path} does not exist: give a tokenizer.json, or leave it out to train one")
        try:
            backend = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception for whatever it cannot parse
            reason = str(error).splitlines()[0] if str(error) else "unknown error"
            raise UserError(f"--tokenizer {file} is not a readable tokenizer.json ({reason})") from error
        return cls._wrap(backend, f"--tokenizer {file}")

    @classmethod
    def _wrap(cls, backend: tokenizers.Tokenizer, origin: str) -> "Tokenizer":
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True  # "encode them like other text", despite its name
        vocabulary = backend.get_vocab(with_added_tokens=True)
        eos_id = next((vocabulary[name] for name in _END_NAMES if name in vocabulary), None)
        if eos_id is None:
            raise UserError(f"{origin} has no end-of-text token: add one of {', '.join(_END_NAMES)}")
        mask_id = next((vocabulary[name] for name in _MASK_NAMES if name in vocabulary), None)
        return cls(backend, max(vocabulary.values()) + 1, eos_id, mask_id, origin)

    @property
    def mask_id(self) -> int:
        """Id of the mask token; `UserError` when there is none (only masked language models ask)."""
        if self.mask_id_or_none is None:
            raise no_mask_token(self.origin)
        return self.mask_id_or_none

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """One int64 array [num_tokens] for each text, without special tokens. Uses all cores."""
        parts = [_parts(text) for text in texts]
        with _all_cores():
            encodings = self.backend.encode_batch_fast(
                [part for text_parts in parts for part in text_parts], add_special_tokens=False
            )
        arrays = (np.array(encoding.ids, dtype=np.int64) for encoding in encodings)
        return [np.concatenate([next(arrays) for _ in text_parts]) for text_parts in parts]

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of token ids, special tokens spelled out."""
        return self.backend.decode([int(token) for token in token_ids], skip_special_tokens=False)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it as a `tokenizer.json`."""
        Path(path).write_text(self.backend.to_str(), encoding="utf-8")

    def fingerprint(self) -> str:
        """32 hex digits that change whenever the encoding may change."""
        return hashlib.blake2b(self.backend.to_str().encode(), digest_size=16).hexdigest()


def no_mask_token(origin: str) -> UserError:
    return UserError(f"{origin} has no mask token, which a masked model needs: add one of {', '.join(_MASK_NAMES)}")


def check_vocab_size(vocab_size: int) -> None:
    """Raise `UserError` for a vocabulary that cannot hold all bytes, or has ids beyond 32 bits."""
    if not MIN_VOCAB_SIZE <= vocab_size <= 2**32:
        raise UserError(f"--vocab-size {vocab_size} is out of range: at least {MIN_VOCAB_SIZE} (256 bytes + specials)")


def train_tokenizer(texts: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level BPE on `texts`; the same texts give the same tokenizer.

    The vocabulary is smaller than `vocab_size` when the texts have fewer distinct words than merges were
    asked for.
    """
    check_vocab_size(vocab_size)
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    with _all_cores():
        backend.train_from_iterator(texts, trainer)
    return Tokenizer._wrap(backend, "the trained tokenizer")


def _parts(text: str) -> list[str]:
    parts: list[str] = []
    start = 0
    while len(text) - start > PART_CHARACTERS:
        limit = start + PART_CHARACTERS
        cut = text.rfind("\n", start + PART_CHARACTERS // 2, limit)
        cut = cut if cut > 0 else text.rfind(" ", start + PART_CHARACTERS // 2, limit)
        cut = cut if cut > 0 else limit
        parts.append(text[start:cut])
        start = cut
    parts.append(text[start:])
    return parts


_PARALLELISM = "TOKENIZERS_PARALLELISM"
_REST = "off"  # read as "no" by the library; no user writes it, so it also says that the value is ours
_pool_owner: int | None = None  # the process whose thread pool encodes


@contextmanager
def _all_cores() -> Iterator[None]:
    """Let `tokenizers` use its thread pool inside the block only.

    Left alone the library warns at every later fork, and a forked child that encodes would wait for threads
    that do not exist in it. So the pool is on while we encode and off between; a forked child stays serial;
    and a choice that the user made in the environment stands.
    """
    global _pool_owner
    ours = os.environ.get(_PARALLELISM, _REST) == _REST
    forked = _pool_owner not in (None, os.getpid())
    if not ours or forked:
        yield
        return
    _pool_owner = os.getpid()
    os.environ[_PARALLELISM] = "true"
    try:
        yield
    finally:
        os.environ[_PARALLELISM] = _REST
