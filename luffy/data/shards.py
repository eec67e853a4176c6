"""Token shards: the corpus as flat arrays of token ids on disk, written once and memory-mapped ever after.

    train-00000.bin   token ids of whole documents, one after another; uint16 if every id fits, else uint32
    train-00000.idx   int64 [num_documents + 1]: the token at which each document begins, and the end
    valid-00000.*     the held-out documents
    tokenizer.json    the tokenizer that wrote them
    manifest.json     counts, sizes and checksums of all of these; written last

Everything is little-endian. Documents are stored bare: the end-of-text token between them is added by the
loader, which is also where sequences are cut, so one set of shards serves every sequence length. A shard ends
with the document that fills it (64 million tokens, 128 MB), so that no document spans two shards. A pair
of flat data and offsets is also how Megatron-LM stores its indexed data sets.
"""

import json
import os
import zlib
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from luffy.data.corpus import SplitName
from luffy.data.progress import Progress, no_progress
from luffy.data.tokenizer import Tokenizer

FORMAT_VERSION = 1
SHARD_TOKENS = 64 << 20
MANIFEST = "manifest.json"
TOKENIZER = "tokenizer.json"
OFFSET_DTYPE = "<i8"

# Characters that are encoded at a time: enough to keep every core busy, little enough to stay near 200 MB.
_BATCH_CHARACTERS = 1 << 20


@dataclass(frozen=True, slots=True)
class FileRecord:
    """What a file must look like: its size in bytes and the CRC-32 of its contents."""

    num_bytes: int
    crc32: int

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read a file and record it."""
        num_bytes = checksum = 0
        with path.open("rb") as file:
            while data := file.read(1 << 22):
                num_bytes += len(data)
                checksum = zlib.crc32(data, checksum)
        return cls(num_bytes, checksum)


@dataclass(frozen=True, slots=True)
class ShardRecord:
    """One shard: the stem of its two files, what it holds, and what they must look like."""

    stem: str
    num_documents: int
    num_tokens: int
    tokens: FileRecord
    offsets: FileRecord


def token_dtype(vocab_size: int) -> str:
    """The smallest little-endian unsigned type that holds every id of the vocabulary."""
    return "<u2" if vocab_size <= 1 << 16 else "<u4"


class SplitWriter:
    """Appends documents to the shards of one split; `close()` returns the records of all shards."""

    def __init__(self, folder: Path, split: SplitName, dtype: str, shard_tokens: int) -> None:
        self._folder, self._split, self._dtype, self._shard_tokens = folder, split, dtype, shard_tokens
        self._records: list[ShardRecord] = []
        self._file: BinaryIO | None = None
        self._checksum = 0
        self._lengths: list[int] = []
        self._num_tokens = 0

    @property
    def _stem(self) -> str:
        return f"{self._split}-{len(self._records):05d}"

    def append(self, token_ids: np.ndarray) -> None:
        """Write one document of at least one token."""
        if self._file is None:
            self._file = (self._folder / f"{self._stem}.bin").open("wb")
        data = token_ids.astype(self._dtype).tobytes()
        self._file.write(data)
        self._checksum = zlib.crc32(data, self._checksum)
        self._lengths.append(len(token_ids))
        self._num_tokens += len(token_ids)
        if self._num_tokens >= self._shard_tokens:
            self._finish_shard()

    def _finish_shard(self) -> None:
        if self._file is None:
            return
        self._file.close()
        offsets = np.zeros(len(self._lengths) + 1, dtype=OFFSET_DTYPE)
        np.cumsum(self._lengths, out=offsets[1:])
        data = offsets.tobytes()
        (self._folder / f"{self._stem}.idx").write_bytes(data)
        num_bytes = self._num_tokens * np.dtype(self._dtype).itemsize
        self._records.append(
            ShardRecord(
                stem=self._stem,
                num_documents=len(self._lengths),
                num_tokens=self._num_tokens,
                tokens=FileRecord(num_bytes, self._checksum),
                offsets=FileRecord(len(data), zlib.crc32(data)),
            )
        )
        self._file, self._checksum, self._lengths, self._num_tokens = None, 0, [], 0

    def close(self) -> list[ShardRecord]:
        self._finish_shard()
        return self._records

    def abandon(self) -> None:
        """Let go of the file that is open, after a failure."""
        if self._file is not None:
            self._file.close()


def build_shards(
    folder: Path,
    documents: Iterable[tuple[SplitName, str]],
    tokenizer: Tokenizer,
    *,
    fingerprint: str,
    num_documents: int | None = None,
    num_empty: int = 0,
    shard_tokens: int = SHARD_TOKENS,
    progress: Progress = no_progress,
) -> None:
    """Tokenise (split, text) pairs into `folder`, which exists and is empty. Not atomic: `prepare_corpus` is.

    `fingerprint` names what the contents were made from; `num_documents`, if known, is the total that
    `progress` reports; `num_empty` documents were skipped before. Documents of which the tokenizer leaves
    nothing are skipped and counted too. The manifest is written last. Raises `OSError` when the disk is full.
    """
    dtype = token_dtype(tokenizer.vocab_size)
    writers = {split: SplitWriter(folder, split, dtype, shard_tokens) for split in ("train", "valid")}
    batch: list[tuple[SplitName, str]] = []
    batch_characters = done = 0

    def flush() -> None:
        nonlocal batch_characters, done, num_empty
        for (split, _), token_ids in zip(batch, tokenizer.encode_batch([text for _, text in batch]), strict=True):
            if len(token_ids):
                writers[split].append(token_ids)
            else:
                num_empty += 1
        done += len(batch) if num_documents is None else min(len(batch), num_documents - done)
        batch.clear()
        batch_characters = 0
        progress(done, num_documents, "tokenising")

    try:
        for split, text in documents:
            batch.append((split, text))
            batch_characters += len(text)
            if batch_characters >= _BATCH_CHARACTERS:
                flush()
        flush()
        shards = {split: [asdict(record) for record in writer.close()] for split, writer in writers.items()}
    finally:
        for writer in writers.values():
            writer.abandon()
    tokenizer.save(folder / TOKENIZER)
    write_manifest(
        folder,
        {
            "version": FORMAT_VERSION,
            "fingerprint": fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
            "mask_id": tokenizer.mask_id_or_none,
            "dtype": dtype,
            "num_empty_documents": num_empty,
            "tokenizer": asdict(FileRecord.of(folder / TOKENIZER)),
            "shards": shards,
        },
    )


def write_manifest(folder: Path, manifest: dict[str, Any]) -> None:
    """Write `manifest.json` with its own checksum, by way of a temporary name."""
    temporary = folder / f".{MANIFEST}"
    temporary.write_text(json.dumps({**manifest, "crc32": _manifest_crc32(manifest)}, indent=1), encoding="utf-8")
    os.replace(temporary, folder / MANIFEST)


def read_manifest(folder: Path) -> dict[str, Any]:
    """Read it back. Raises `ValueError` when it is not what was written, `OSError` when it is not there."""
    manifest = json.loads((folder / MANIFEST).read_bytes())
    if not isinstance(manifest, dict) or manifest.pop("crc32", None) != _manifest_crc32(manifest):
        raise ValueError(f"{MANIFEST} was altered")
    return manifest


def _manifest_crc32(manifest: dict[str, Any]) -> int:
    return zlib.crc32(json.dumps(manifest, sort_keys=True).encode())
