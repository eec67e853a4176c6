"""Documents come out of every format in a fixed order, and every mistake is named in one line."""

import errno
import gzip
import itertools
import json
import os
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from luffy.data import Document, ReadTally, formats, iter_documents
from luffy.data.corpus import list_source_files
from luffy.errors import UserError

from .conftest import sentences, write_jsonl

TEXTS = ["one\ntwo", "three – ünïcode 汉字 🙂", "four"]


def texts_of(source: Path, text_field: str = "text") -> list[str]:
    return [document.text for document in iter_documents(str(source), text_field)]


def error_of(source: Path | str, text_field: str = "text") -> str:
    with pytest.raises(UserError) as caught:
        list(iter_documents(str(source), text_field))
    message = str(caught.value)
    assert "\n" not in message
    return message


def write_gzip(path: Path, texts: list[str]) -> Path:
    path.write_bytes(gzip.compress("".join(json.dumps({"text": text}) + "\n" for text in texts).encode()))
    return path


def test_every_format_gives_the_same_documents(tmp_path: Path) -> None:
    sources = [tmp_path / name for name in ("a.jsonl", "a.jsonl.gz", "a.parquet", "folder")]
    write_jsonl(sources[0], TEXTS)
    write_gzip(sources[1], TEXTS)
    pq.write_table(pa.table({"n": [1, 2, 3], "text": TEXTS}), sources[2])
    sources[3].mkdir()
    for index, text in enumerate(TEXTS):
        (sources[3] / f"{index}.txt").write_text(text, encoding="utf-8")
    assert [texts_of(source) for source in sources] == [TEXTS] * 4


@pytest.mark.parametrize("column", [pa.large_string(), pa.dictionary(pa.int32(), pa.string())])
def test_parquet_string_like_columns(tmp_path: Path, column: pa.DataType) -> None:
    pq.write_table(pa.table({"text": pa.array(["a", None, "b"], pa.string()).cast(column)}), tmp_path / "a.parquet")
    assert texts_of(tmp_path / "a.parquet") == ["a", "b"]


def test_folders_are_read_recursively_in_sorted_order(tmp_path: Path) -> None:
    for name in ("b.txt", "a/z.TXT", "a/b/c.txt", ".hidden/x.txt", ".x.txt", "notes.md"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    (tmp_path / "a" / "loop").symlink_to(tmp_path)
    assert texts_of(tmp_path) == ["a/b/c.txt", "a/z.TXT", "b.txt"]


def test_text_field_is_chosen(tmp_path: Path) -> None:
    assert texts_of(write_jsonl(tmp_path / "a.jsonl", TEXTS, "body"), text_field="body") == TEXTS


def test_blank_lines_byte_order_marks_and_half_surrogates(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n\n  \n{"text": "\\ud83d\\ude42 \\ud83d."}')
    assert texts_of(path) == ["a", "🙂 \ufffd."]
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfhello")
    assert texts_of(tmp_path / "a.txt") == ["hello"]


def test_empty_documents_are_skipped_and_counted(tmp_path: Path) -> None:
    path, tally = write_jsonl(tmp_path / "a.jsonl", ["", "x", " \n\t", None, "y"]), ReadTally()
    assert list(iter_documents(str(path), tally=tally)) == [Document("x"), Document("y")]
    assert (tally.num_documents, tally.num_empty) == (2, 3)


@pytest.mark.parametrize("name", ["valid", "my-validation_set", "heldout.v2", "dev", "x.test", "TEST"])
def test_held_out_files_are_told_by_their_names(tmp_path: Path, name: str) -> None:
    write_jsonl(tmp_path / "contest.jsonl", ["train"])
    write_gzip(tmp_path / f"{name}.jsonl.gz", ["valid"])
    assert {document.text: document.split for document in iter_documents(str(tmp_path))} == {
        "train": "train",
        "valid": "valid",
    }
    assert [document.split for document in iter_documents(str(tmp_path / f"{name}.jsonl.gz"))] == [None]
    (tmp_path / "contest.jsonl").unlink()
    assert [document.split for document in iter_documents(str(tmp_path))] == [None]


def test_a_large_text_file_is_read_in_blocks_that_end_at_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(formats, "MAX_TEXT_DOCUMENT_BYTES", 100)
    monkeypatch.setattr(formats, "TEXT_BLOCK_BYTES", 40)
    lines = "".join(f"line {index} is short\n" for index in range(30))
    (tmp_path / "a.txt").write_text(lines)
    blocks = texts_of(tmp_path / "a.txt")
    assert "".join(blocks) == lines and len(blocks) > 5 and all(block.endswith("\n") for block in blocks)
    (tmp_path / "a.txt").write_text("汉字🙂" * 50, encoding="utf-8")  # no line ends: blocks cut characters in two
    assert "".join(texts_of(tmp_path / "a.txt")) == "汉字🙂" * 50
    (tmp_path / "a.txt").write_bytes(b"x" * 130 + b"\xff")
    assert "byte 130" in error_of(tmp_path / "a.txt")


def test_documents_stream(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", TEXTS)
    with path.open("a") as file:
        file.write("broken\n")
    documents = iter_documents(str(path))
    assert [next(documents).text for _ in TEXTS] == TEXTS  # the broken line is not reached yet
    with pytest.raises(UserError, match=r"a\.jsonl:4 is not valid JSON"):
        next(documents)


def test_missing_source_fails_at_the_call(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--data .*nowhere does not exist"):
        iter_documents(str(tmp_path / "nowhere"))


def test_no_usable_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").write_text("x")
    assert ".jsonl" in error_of(tmp_path) and "no usable file" in error_of(tmp_path)
    assert "no known format" in error_of(tmp_path / "notes.md")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        (b'{"text": "x"', "a.jsonl:2 is not valid JSON"),
        (b"[1, 2]", "a.jsonl:2 is a JSON array"),
        (b'{"text": ' + b"9" * 5000 + b"}", "a.jsonl:2 is not usable JSON"),
        (b"[" * 200_000, "a.jsonl:2 is not"),
        (
            b'{"body": "x", "domain": "y"}',
            "has no field 'text': choose one with --text-field (fields here: body, domain)",
        ),
        (b'{"text": 5}', "'text' is a JSON number, not a string"),
        (b'{"text": ["x"]}', "'text' is a JSON array, not a string"),
        (b'{"text": "\xff"}', "a.jsonl:2 is not UTF-8 (byte 10 of the line)"),
    ],
)
def test_bad_lines_are_named(tmp_path: Path, line: bytes, said: str) -> None:
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "fine"}\n' + line + b"\n")
    message = error_of(tmp_path / "a.jsonl")
    assert said in message and "--data" in message
    assert len(message) < 400


def test_text_file_that_is_not_utf8(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("schön".encode("latin-1"))
    assert "a.txt is not UTF-8 (byte 3)" in error_of(tmp_path / "a.txt")
    (tmp_path / "a.txt").write_bytes("schö".encode()[:-1])
    assert "ends inside a character" in error_of(tmp_path / "a.txt")


def test_damaged_gzip(tmp_path: Path) -> None:
    path = write_gzip(tmp_path / "a.jsonl.gz", sentences(200))
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert "damaged gzip" in error_of(path)
    path.write_bytes(sound[:50] + bytes(64) + sound[114:])
    assert "damaged gzip" in error_of(path) or "not valid JSON" in error_of(path)
    path.write_bytes(sound[:-8] + bytes(8))
    assert "damaged gzip" in error_of(path)
    path.write_bytes(b"plain text")
    assert "damaged gzip" in error_of(path)


def test_damaged_parquet(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": sentences(50), "n": list(range(50))}), path)
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert "not a sound Parquet file" in error_of(path)
    path.write_bytes(sound[:8] + bytes(400) + sound[408:])
    assert "not a sound Parquet file" in error_of(path)
    path.write_bytes(sound)
    assert "(fields here: text, n)" in error_of(path, text_field="body")
    assert "column 'n' holds int64, not strings" in error_of(path, text_field="n")
    pq.write_table(pa.table({"text": pa.array([b"\xff"], pa.binary()).view(pa.string())}), path)
    assert "not UTF-8" in error_of(path)


def test_only_empty_documents(tmp_path: Path) -> None:
    assert "all 2 documents are empty" in error_of(write_jsonl(tmp_path / "a.jsonl", ["", " "]))


@pytest.mark.parametrize("source", ["a.jsonl", "a.txt", "a.parquet", "stdlib"])
def test_file_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str) -> None:
    def refuse(*args: object, **options: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "open", refuse)
    monkeypatch.setattr(Path, "read_text", refuse)
    monkeypatch.setattr(pq, "ParquetFile", refuse)
    path = tmp_path / source
    path.touch()
    assert "cannot be read: Permission denied" in error_of("stdlib" if source == "stdlib" else path)


def test_stdlib_is_the_library_without_its_tests() -> None:
    names = [file.name for file in list_source_files("stdlib")]
    assert {"ast.py", "json/decoder.py"} <= set(names)
    assert names == sorted(names, key=lambda name: name.split("/"))
    assert not any({"test", "tests", "idle_test", "site-packages"} & set(name.split("/")) for name in names)
    first, again = ([text.text for text in itertools.islice(iter_documents("stdlib"), 50)] for _ in range(2))
    assert first == again and len(first) == 50 and all(text.strip() for text in first)
