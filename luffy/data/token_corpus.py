"""Opening token shards: memory-mapped, verified once, cheap to hand to another process.

A split holds only paths and counts until its first document is read; pickling one sends those few fields, and
every process that opens the same folder shares the same pages of memory.
"""

import os
from bisect import bisect_right
from dataclasses import dataclass, fields
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import numpy as np

from luffy.data.shards import (
    FORMAT_VERSION,
    MANIFEST,
    OFFSET_DTYPE,
    TOKENIZER,
    FileRecord,
    ShardRecord,
    read_manifest,
)
from luffy.data.tokenizer import Tokenizer, no_mask_token
from luffy.errors import UserError


class _CheapToPickle:
    """Pickles the declared fields only, never a cached mapping or tokenizer."""

    def __getstate__(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self)}  # type: ignore[arg-type]


@dataclass(frozen=True)
class TokenSplit(_CheapToPickle):
    """The documents of one split, numbered across its shards."""

    folder: Path
    name: str
    dtype: str
    shards: tuple[ShardRecord, ...]

    @property
    def num_documents(self) -> int:
        return sum(shard.num_documents for shard in self.shards)

    @property
    def num_tokens(self) -> int:
        """Tokens of all documents, without any end-of-text token."""
        return sum(shard.num_tokens for shard in self.shards)

    def document(self, index: int) -> np.ndarray:
        """Token ids of a document: a read-only view [num_tokens] into the shard, uint16 or uint32."""
        if not 0 <= index < self.num_documents_before[-1]:
            raise IndexError(f"document {index} of {self.num_documents}")
        shard = bisect_right(self.num_documents_before, index) - 1
        tokens, offsets = self._mapped[shard]
        local = index - self.num_documents_before[shard]
        return tokens[offsets[local] : offsets[local + 1]]

    def document_lengths(self) -> np.ndarray:
        """Tokens of every document: int64 [num_documents]."""
        lengths = [np.diff(offsets) for _, offsets in self._mapped]
        return np.concatenate(lengths).astype(np.int64, copy=False) if lengths else np.zeros(0, dtype=np.int64)

    @cached_property
    def num_documents_before(self) -> list[int]:
        return [0, *accumulate(shard.num_documents for shard in self.shards)]

    @cached_property
    def _mapped(self) -> list[tuple[np.ndarray, np.ndarray]]:
        """(tokens, offsets) of each shard, as plain arrays: slicing those is cheaper than an `np.memmap`."""
        return [
            (
                np.memmap(self.folder / f"{shard.stem}.bin", dtype=self.dtype, mode="r").view(np.ndarray),
                np.memmap(self.folder / f"{shard.stem}.idx", dtype=OFFSET_DTYPE, mode="r").view(np.ndarray),
            )
            for shard in self.shards
        ]


@dataclass(frozen=True)
class TokenCorpus(_CheapToPickle):
    """A tokenised corpus in `folder`: its vocabulary, its training split and its held-out split."""

    folder: Path
    fingerprint: str
    vocab_size: int
    eos_id: int
    mask_id_or_none: int | None
    num_empty_documents: int
    train: TokenSplit
    valid: TokenSplit

    @property
    def tokenizer_path(self) -> Path:
        return self.folder / TOKENIZER

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Loaded at first use; training itself never needs it."""
        return Tokenizer.from_file(self.tokenizer_path)

    @property
    def mask_id(self) -> int:
        """Id of the mask token; `UserError` when the tokenizer has none (only masked language models ask)."""
        if self.mask_id_or_none is None:
            raise no_mask_token(f"--tokenizer {self.tokenizer_path}")
        return self.mask_id_or_none


def open_corpus(folder: str | os.PathLike[str], *, verify_checksums: bool = True) -> TokenCorpus:
    """Open what `prepare_corpus` built.

    File sizes are always verified; checksums too (about 1 GB a second) unless a process that has just done so
    says otherwise. Raises `UserError` when the folder is missing, damaged, or of another version's format.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} does not exist: give the folder that luffy's data preparation made")
    try:
        manifest = read_manifest(folder)
        if manifest["version"] != FORMAT_VERSION:
            raise UserError(f"{folder} was written by another version of luffy; delete {folder} and run again")
        splits = {
            name: TokenSplit(folder, name, manifest["dtype"], tuple(_shard_record(entry) for entry in entries))
            for name, entries in manifest["shards"].items()
        }
        files = {TOKENIZER: FileRecord(**manifest["tokenizer"])}
        for split in splits.values():
            for shard in split.shards:
                files |= {f"{shard.stem}.bin": shard.tokens, f"{shard.stem}.idx": shard.offsets}
        for name, expected in files.items():
            _verify(folder / name, expected, verify_checksums)
        return TokenCorpus(
            folder=folder,
            fingerprint=manifest["fingerprint"],
            vocab_size=manifest["vocab_size"],
            eos_id=manifest["eos_id"],
            mask_id_or_none=manifest["mask_id"],
            num_empty_documents=manifest["num_empty_documents"],
            train=splits["train"],
            valid=splits["valid"],
        )
    except FileNotFoundError as error:
        raise _damaged(folder, f"{Path(error.filename or MANIFEST).name} is missing") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}; see --cache-dir") from error
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(folder, str(error)) from error


def _shard_record(entry: dict[str, Any]) -> ShardRecord:
    return ShardRecord(**{**entry, "tokens": FileRecord(**entry["tokens"]), "offsets": FileRecord(**entry["offsets"])})


def _verify(path: Path, expected: FileRecord, verify_checksum: bool) -> None:
    num_bytes = path.stat().st_size
    if num_bytes != expected.num_bytes:
        raise ValueError(f"{path.name} has {num_bytes} bytes instead of {expected.num_bytes}")
    if verify_checksum and FileRecord.of(path) != expected:
        raise ValueError(f"{path.name} does not match its checksum")


def _damaged(folder: Path, what: str) -> UserError:
    return UserError(f"{folder} is damaged ({what}); delete {folder} and run again")
