"""The cache: built once by one process, never half, and never stale."""

import errno
import gzip
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luffy.data import Tokenizer, prepare, prepare_corpus, shards, train_tokenizer
from luffy.errors import UserError

from .conftest import sentences, write_jsonl
from .helpers import build, texts_of


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_every_document_is_in_one_split(corpus_file: Path, tmp_path: Path) -> None:
    corpus, steps = build(corpus_file, tmp_path / "cache", valid_fraction=0.2)
    assert steps == ["reading", "training the tokenizer", "tokenising"]
    assert sorted(texts_of(corpus, "train") + texts_of(corpus, "valid")) == sorted(sentences(40))
    assert 5 <= corpus.valid.num_documents <= 8  # lengths differ a little, the share is of characters


def test_second_time_comes_from_the_cache(corpus_file: Path, tmp_path: Path) -> None:
    first, _ = build(corpus_file, tmp_path / "cache")
    second, steps = build(corpus_file, tmp_path / "cache")
    assert second == first and steps == []


def test_builds_are_identical(corpus_file: Path, tmp_path: Path) -> None:
    one, two = (build(corpus_file, tmp_path / name)[0] for name in ("a", "b"))
    assert contents(one.folder) == contents(two.folder) and one.folder.name == two.folder.name


def test_whatever_changes_the_contents_changes_the_folder(corpus_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    base, _ = build(corpus_file, cache)
    (tmp_path / "other.jsonl").write_text('{"text": "some words", "body": "other words"}\n' * 3)
    folders = {
        base.folder,
        build(corpus_file, cache, vocab_size=301)[0].folder,
        build(corpus_file, cache, valid_fraction=0.1)[0].folder,
        build(corpus_file, cache, tokenizer=base.tokenizer_path)[0].folder,
        build(tmp_path / "other.jsonl", cache)[0].folder,
        build(tmp_path / "other.jsonl", cache, text_field="body")[0].folder,
    }
    os.utime(corpus_file, (1, 1))
    folders.add(build(corpus_file, cache)[0].folder)
    assert len(folders) == 7


def test_a_given_tokenizer_is_used(corpus_file: Path, tmp_path: Path) -> None:
    base, _ = build(corpus_file, tmp_path / "cache")
    other = write_jsonl(tmp_path / "other.jsonl", ["completely different words"] * 3)
    corpus, steps = build(other, tmp_path / "cache", tokenizer=base.tokenizer_path.parent)
    assert corpus.tokenizer.fingerprint() == base.tokenizer.fingerprint()
    assert "training the tokenizer" not in steps


def test_parquet_and_gzip_prepare_alike(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": sentences(40)}), tmp_path / "a.parquet")
    plain = write_jsonl(tmp_path / "a.jsonl", sentences(40))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(plain.read_bytes()))
    corpora = [build(tmp_path / name, tmp_path / "c")[0] for name in ("a.parquet", "a.jsonl.gz", "a.jsonl")]
    assert len({(corpus.train.num_tokens, corpus.valid.num_tokens) for corpus in corpora}) == 1


def test_library_sources_prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "lib"
    (library / "test").mkdir(parents=True)
    for name in ("ast.py", "bisect.py", "copy.py", "test/none.py"):
        (library / name).write_text(
            Path(os.__file__).with_name(Path(name).name if "none" not in name else "this.py").read_text()
        )
    monkeypatch.setattr("sysconfig.get_paths", lambda: {"stdlib": str(library)})
    corpus, _ = build("stdlib", tmp_path / "cache")
    assert corpus.folder.name.startswith("stdlib-")
    assert (corpus.train.num_documents, corpus.valid.num_documents) == (2, 1)


def test_default_cache_folder(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert prepare_corpus(corpus_file, vocab_size=300).folder.parent == tmp_path / "xdg" / "luffy"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert prepare_corpus(corpus_file, vocab_size=300).folder.parent == tmp_path / "home" / ".cache" / "luffy"


# One builder at a time, all or nothing

CHILD = """
import sys, os, signal, time
from pathlib import Path
from luffy.data import prepare_corpus
source, cache, me, marks = sys.argv[1], sys.argv[2], sys.argv[3], Path(sys.argv[4])
def progress(done, total, description):
    if me == "killed" and description == "tokenising":
        os.kill(os.getpid(), signal.SIGKILL)
    (marks / f"{me} {description.split()[0]}").touch()
    while me == "first" and description == "tokenising" and not (marks / "second waiting").exists():
        time.sleep(0.01)
corpus = prepare_corpus(source, vocab_size=300, cache_dir=cache, progress=progress)
print(corpus.folder, corpus.train.num_tokens)
"""


def start(source: Path, cache: Path, name: str, marks: Path) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", CHILD, str(source), str(cache), name, str(marks)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < deadline, "nothing happened for 20 seconds"
        time.sleep(0.01)


def test_a_killed_build_leaves_nothing_that_looks_finished(corpus_file: Path, tmp_path: Path) -> None:
    cache, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    child = start(corpus_file, cache, "killed", marks)
    child.communicate(timeout=30)
    assert child.returncode == -9
    leftovers = [path for path in cache.iterdir() if path.is_dir()]
    assert len(leftovers) == 1 and ".building-" in leftovers[0].name  # where the kill left it
    corpus, steps = build(corpus_file, cache)
    assert "tokenising" in steps
    assert not leftovers[0].exists()
    assert contents(corpus.folder) == contents(build(corpus_file, tmp_path / "clean")[0].folder)


def test_two_processes_build_once(corpus_file: Path, tmp_path: Path) -> None:
    cache, marks = tmp_path / "cache", tmp_path / "marks"
    marks.mkdir()
    first = start(corpus_file, cache, "first", marks)
    wait_for((marks / "first reading").exists)  # it holds the lock, and will until the second waits for it
    second = start(corpus_file, cache, "second", marks)
    (out, errors), (out_2, errors_2) = first.communicate(timeout=30), second.communicate(timeout=30)
    assert (first.returncode, second.returncode) == (0, 0), errors + errors_2
    assert out == out_2
    assert {path.name for path in marks.iterdir() if path.name.startswith("second")} == {"second waiting"}
    assert [path.name for path in cache.iterdir() if path.is_dir()] == [Path(out.split()[0]).name]


def test_a_failed_build_leaves_nothing(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [*sentences(5), 5])
    with pytest.raises(UserError, match=r"a\.jsonl:6"):
        build(path, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("num_documents_after", [8, 12])
def test_source_that_changes_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, num_documents_after: int
) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sentences(10))

    def train(texts: list[str], vocab_size: int) -> Tokenizer:
        write_jsonl(path, sentences(num_documents_after))
        return train_tokenizer(texts, vocab_size)

    monkeypatch.setattr(prepare, "train_tokenizer", train)
    with pytest.raises(UserError, match="--data changed while"):
        build(path, tmp_path / "cache")


@pytest.mark.parametrize(
    ("number", "said"),
    [
        (errno.ENOSPC, "is on a full disk"),
        (errno.EDQUOT, "is on a full disk"),
        (errno.EROFS, "cannot be written"),
    ],
)
def test_disk_full(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int, said: str) -> None:
    def append(self: shards.SplitWriter, token_ids: np.ndarray) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(shards.SplitWriter, "append", append)
    with pytest.raises(UserError, match=rf"--cache-dir .*cache {said}"):
        build(corpus_file, tmp_path / "cache")
    assert not [entry for entry in (tmp_path / "cache").iterdir() if entry.is_dir()]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs /dev/full")
def test_a_disk_that_is_really_full(corpus_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    open_path = Path.open
    monkeypatch.setattr(
        Path,
        "open",
        lambda self, *args: open_path(Path("/dev/full") if self.suffix == ".bin" else self, *args),
    )
    with pytest.raises(UserError, match=r"--cache-dir .* is on a full disk"):
        build(corpus_file, tmp_path / "cache")


def test_cache_folder_that_is_a_file(corpus_file: Path) -> None:
    for cache in (corpus_file, corpus_file / "below"):
        with pytest.raises(UserError, match=r"--cache-dir .* cannot be written"):
            build(corpus_file, cache)


def test_damaged_cache_says_what_to_delete(corpus_file: Path, tmp_path: Path) -> None:
    corpus, _ = build(corpus_file, tmp_path / "cache")
    path = corpus.folder / "train-00000.bin"
    path.write_bytes(path.read_bytes()[::-1])
    with pytest.raises(UserError, match=f"delete {corpus.folder} and run again"):
        build(corpus_file, tmp_path / "cache")


@pytest.mark.parametrize("fraction", [0, 1, -0.5, 2, float("nan")])
def test_valid_fraction_out_of_range(corpus_file: Path, tmp_path: Path, fraction: float) -> None:
    with pytest.raises(UserError, match="--valid-fraction"):
        build(corpus_file, tmp_path, valid_fraction=fraction)


def test_mistakes_in_options_build_nothing(corpus_file: Path, tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    with pytest.raises(UserError, match="--vocab-size"):
        build(corpus_file, cache, vocab_size=10)
    with pytest.raises(UserError, match="--tokenizer"):
        build(corpus_file, cache, tokenizer=tmp_path / "none.json")
    with pytest.raises(UserError, match="--data"):
        build(tmp_path / "none", cache)
    assert not cache.exists()


def test_nothing_here_talks_to_a_network() -> None:
    code = "import luffy.data, sys; raise SystemExit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
