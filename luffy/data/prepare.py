"""The cache of tokenised corpora: built once, by one process, or not at all.

A job starts as many processes at the same moment, all of which want the same shards. The first to take the
file lock builds them in a temporary folder beside the final one and renames it when it is complete; the
others sleep on the lock and find it there. A rename is atomic, so a folder under its final name is always
complete: a killed build leaves only a temporary folder, which the next builder of the same corpus removes.
The operating system drops the lock of a process that dies, so there is no stale lock to clean up either.

The folder's name holds a hash of everything that determines its contents. Files are represented by name, size
and modification time rather than by their bytes, as `make` does it: hashing them would read the corpus at
every start.
"""

import errno
import fcntl
import hashlib
import json
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from luffy.data.corpus import STDLIB, iter_documents, list_source_files
from luffy.data.heldout import SAMPLE_CHARACTERS, choose_held_out, survey_corpus
from luffy.data.progress import Progress, no_progress
from luffy.data.shards import FORMAT_VERSION, SHARD_TOKENS, build_shards
from luffy.data.token_corpus import TokenCorpus, open_corpus
from luffy.data.tokenizer import Tokenizer, check_vocab_size, train_tokenizer
from luffy.errors import UserError


def prepare_corpus(
    source: str | os.PathLike[str],
    *,
    text_field: str = "text",
    tokenizer: str | os.PathLike[str] | None = None,
    vocab_size: int = 8192,
    cache_dir: str | os.PathLike[str] | None = None,
    valid_fraction: float = 0.02,
    progress: Progress | None = None,
) -> TokenCorpus:
    """The tokenised corpus of `source`: from the cache, or built now (about 3 MB a second on two cores).

    `source` and `text_field` are as for `iter_documents`. `tokenizer` is the path of a `tokenizer.json`;
    without one a byte-level BPE of `vocab_size` ids (fewer if the text is small) is trained on the corpus.
    `cache_dir` defaults to `$XDG_CACHE_HOME/luffy` or `~/.cache/luffy`. `valid_fraction` of the characters
    are held out unless files named as held-out decide. Any number of processes may ask at once.

    Raises `UserError` naming `--data`, `--text-field`, `--tokenizer`, `--vocab-size`, `--valid-fraction` or
    `--cache-dir`.
    """
    report = no_progress if progress is None else progress
    if not 0 < valid_fraction < 1:
        raise UserError(f"--valid-fraction {valid_fraction} is out of range: choose a share between 0 and 1")
    loaded = None if tokenizer is None else Tokenizer.from_file(tokenizer)
    if loaded is None:
        check_vocab_size(vocab_size)
    fingerprint = _fingerprint(source, text_field, loaded, vocab_size, valid_fraction)
    cache = _cache_folder(cache_dir)
    folder = cache / f"{_readable(source)}-{fingerprint[:16]}"
    if not folder.exists():
        with _locked(cache / f".{folder.name}.lock", report), _cache_errors(cache):
            if not folder.exists():  # another process may have built it while we waited for the lock
                _build(folder, source, text_field, loaded, vocab_size, valid_fraction, fingerprint, report)
    return open_corpus(folder)


def _build(
    folder: Path,
    source: str | os.PathLike[str],
    text_field: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    valid_fraction: float,
    fingerprint: str,
    progress: Progress,
) -> None:
    prefix = f".{folder.name}.building-"
    for leftover in folder.parent.glob(f"{prefix}*"):  # of a killed build: we hold the lock, so nobody is in there
        shutil.rmtree(leftover, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    try:
        survey = survey_corpus(
            source, text_field, sample_characters=0 if tokenizer else SAMPLE_CHARACTERS, progress=progress
        )
        if tokenizer is None:
            progress(0, None, "training the tokenizer")
            tokenizer = train_tokenizer(survey.sample, vocab_size)
        held_out = choose_held_out(survey, valid_fraction)
        build_shards(
            temporary,
            held_out.route(iter_documents(source, text_field)),
            tokenizer,
            fingerprint=fingerprint,
            num_documents=len(survey.keys),
            num_empty=survey.num_empty,
            shard_tokens=SHARD_TOKENS,
            progress=progress,
        )
        temporary.chmod(0o755)  # mkdtemp makes it private, which a shared cache is not
        temporary.rename(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fingerprint(
    source: str | os.PathLike[str],
    text_field: str,
    tokenizer: Tokenizer | None,
    vocab_size: int,
    valid_fraction: float,
) -> str:
    files = list_source_files(source)
    inputs: dict[str, Any] = {
        "format": FORMAT_VERSION,
        "text_field": text_field,
        "tokenizer": tokenizer.fingerprint() if tokenizer else f"byte-level BPE {vocab_size} {SAMPLE_CHARACTERS}",
        "valid_fraction": valid_fraction,
    }
    if source == STDLIB:  # the version says it all: modification times are those of the installation
        inputs["source"] = [STDLIB, platform.python_version()]
        inputs["files"] = [[file.name, file.num_bytes] for file in files]
    else:
        inputs["source"] = os.path.realpath(os.path.expanduser(source))
        inputs["files"] = [[file.name, file.num_bytes, file.mtime_ns] for file in files]
    return hashlib.blake2b(json.dumps(inputs).encode(), digest_size=16).hexdigest()


def _readable(source: str | os.PathLike[str]) -> str:
    """A short name from the source, so that a person finds their way in the cache folder."""
    name = Path(source).name.split(".")[0] if source != STDLIB else STDLIB
    return re.sub(r"[^A-Za-z0-9_-]+", "-", name).strip("-")[:40] or "corpus"


def _cache_folder(cache_dir: str | os.PathLike[str] | None) -> Path:
    if cache_dir is None:
        cache_dir = Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "luffy"
    folder = Path(cache_dir).expanduser().absolute()
    with _cache_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def _locked(path: Path, progress: Progress) -> Iterator[None]:
    with _cache_errors(path.parent):
        file = path.open("a")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            progress(0, None, "waiting for another process that prepares the same data")
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


@contextmanager
def _cache_errors(cache: Path) -> Iterator[None]:
    """What goes wrong when the cache is written is the user's to mend (sources have their own errors)."""
    try:
        yield
    except BrokenPipeError:  # from a progress bar, not from us
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"--cache-dir {cache} is on a full disk: free some space or name a folder elsewhere"
            ) from error
        raise UserError(
            f"--cache-dir {cache} cannot be written ({error.strerror or error}): name another folder"
        ) from error
