"""From a path, or the word `stdlib`, to documents in a fixed order.

Everything downstream (which documents train the tokenizer, which are held out, in which shard a document
lies) is a function of a document's index, so the order must be the same on every machine and at every run:
files are sorted by their path relative to the source, records keep their order in the file.

Files whose name says so (`valid.jsonl`, `corpus-test.txt`) are the held-out split, the way data sets are
usually laid out on disk. `stdlib` is the source code of the running Python's standard library: about 12 MB of
real text that every machine has, so that a first run needs no download.
"""

import os
import re
import sysconfig
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from luffy.data.formats import JSON, SUFFIXES, read_texts
from luffy.errors import UserError

STDLIB = "stdlib"

SplitName = Literal["train", "valid"]

_HELD_OUT_WORDS = frozenset({"valid", "validation", "heldout", "dev", "test"})
# Not the library itself, or text that is odd on purpose (tests hold broken encodings and huge tables).
_STDLIB_EXCLUDED = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True, slots=True)
class Document:
    """One text, and the split that its file's name asks for (None: nothing was asked)."""

    text: str
    split: SplitName | None = None


@dataclass(frozen=True, slots=True)
class SourceFile:
    """One file of a corpus: `name` is its path relative to the source, with forward slashes."""

    path: Path
    name: str
    num_bytes: int
    mtime_ns: int
    split: SplitName | None = None


@dataclass(slots=True)
class ReadTally:
    """What an iteration has met so far: `num_empty` counts documents without any text, which are skipped."""

    num_documents: int = 0
    num_empty: int = 0


def list_source_files(source: str | os.PathLike[str]) -> list[SourceFile]:
    """The files of a corpus, in reading order.

    `source` is a file, a folder (searched with all its subfolders; hidden ones are left out), or `stdlib`.
    Raises `UserError` when it does not exist or holds no file of a known format.
    """
    if source == STDLIB:
        root = Path(sysconfig.get_paths()["stdlib"])
        paths = _walk(root, (".py",), _STDLIB_EXCLUDED) if root.is_dir() else []
        if not paths:
            raise UserError(f"--data stdlib: this Python has no library sources in {root}; give a path to --data")
        return [_source_file(path, root) for path in paths]

    root = Path(source).expanduser()
    if not root.exists():
        raise UserError(f"--data {source} does not exist: give a file, a folder, or the word stdlib")
    if root.is_file():
        if not root.name.lower().endswith((*SUFFIXES, JSON)):
            raise UserError(f"--data {source} is of no known format: use {', '.join((*SUFFIXES, JSON))}")
        return [_source_file(root, root.parent)]
    files = [_source_file(path, root) for path in _walk(root, SUFFIXES) or _walk(root, (JSON,))]
    if not files:
        raise UserError(f"--data {source} holds no usable file: put {', '.join(SUFFIXES)} files there")
    held_out = [_is_held_out_name(file.path.name) for file in files]
    if not any(held_out) or all(held_out):
        return files
    return [
        SourceFile(file.path, file.name, file.num_bytes, file.mtime_ns, "valid" if held else "train")
        for file, held in zip(files, held_out, strict=True)
    ]


def iter_documents(
    source: str | os.PathLike[str], text_field: str = "text", tally: ReadTally | None = None
) -> Iterator[Document]:
    """Yield the documents of `source` in their fixed order, one in memory at a time.

    `text_field` names the field or column of `.jsonl`, `.jsonl.gz`, `.json` and `.parquet` records that holds the
    text; text files ignore it. Documents without text (white space only, `null`) are skipped and counted
    in `tally`.

    Raises `UserError`: at once when the source is missing or of no known format; while iterating when a file
    is damaged, not UTF-8, or lacks the field; at the end when every document was empty.
    """
    files = list_source_files(source)  # outside the generator, so that a wrong path fails at the call
    return _iter_files(files, source, text_field, ReadTally() if tally is None else tally)


def _iter_files(
    files: list[SourceFile], source: str | os.PathLike[str], text_field: str, tally: ReadTally
) -> Iterator[Document]:
    for file in files:
        texts = _read_python(file.path) if source == STDLIB else read_texts(file.path, text_field)
        for text in texts:
            if text is None or not text.strip():
                tally.num_empty += 1
                continue
            tally.num_documents += 1
            yield Document(text, file.split)
    if tally.num_documents == 0:
        raise UserError(f"--data {source}: all {tally.num_empty} documents are empty, there is no text to train on")


def _read_python(path: Path) -> Iterator[str]:
    """A library module; a stray non-UTF-8 byte is no mistake of the user's, so it is replaced."""
    try:
        yield path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--data stdlib: {path} cannot be read: {error.strerror}") from error


def _source_file(path: Path, root: Path) -> SourceFile:
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror}") from error
    return SourceFile(path, path.relative_to(root).as_posix(), stat.st_size, stat.st_mtime_ns)


def _walk(root: Path, suffixes: tuple[str, ...], excluded: frozenset[str] = frozenset()) -> list[Path]:
    """Files below `root` with one of the suffixes, sorted by relative path; links are followed once."""
    found: list[Path] = []
    seen: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_cannot_list):
        real = os.path.realpath(folder)
        if real in seen:  # a link to a folder above it would otherwise be walked for ever
            subfolders.clear()
            continue
        seen.add(real)
        subfolders[:] = sorted(name for name in subfolders if not name.startswith(".") and name not in excluded)
        found += [Path(folder, name) for name in names if name.lower().endswith(suffixes) and not name.startswith(".")]
    return sorted(found, key=lambda path: path.relative_to(root).parts)


def _cannot_list(error: OSError) -> None:
    raise UserError(f"--data {error.filename} cannot be read: {error.strerror}") from error


def _is_held_out_name(name: str) -> bool:
    stem = name.lower()
    for suffix in (".gz", ".jsonl", ".json", ".txt", ".parquet"):
        stem = stem.removesuffix(suffix)
    return not _HELD_OUT_WORDS.isdisjoint(re.split(r"[^a-z0-9]+", stem))
