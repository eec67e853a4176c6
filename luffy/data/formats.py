"""Reading texts out of files, one at a time.

Four formats cover most corpora: plain text, JSON lines (one object a line, what most crawls and the Hugging
Face hub offer), the same gzipped, and Parquet. Each reader is a generator that keeps at most one document (or
one Parquet batch) in memory, and turns whatever is wrong with a file into one `UserError` line that says
where: a corpus of millions of lines is only mendable when the message names the file and the line.

A reader yields `None` where a record holds no text (JSON `null`), so that the caller can count what it skips.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

from luffy.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")

# A text file up to this size is one document; a larger one (a whole corpus in one file) is read in blocks
# that end at a line, each a document, so that memory stays bounded and some of them can be held out for
# validation.
MAX_TEXT_DOCUMENT_BYTES = 16 << 20
TEXT_BLOCK_BYTES = 1 << 20

_PARQUET_BATCH_ROWS = 256


def read_texts(path: Path, text_field: str) -> Iterator[str | None]:
    """The texts of one file, by its suffix; raises `UserError` for whatever cannot be read."""
    name = path.name.lower()
    try:
        if name.endswith(".parquet"):
            yield from _read_parquet(path, text_field)
        elif name.endswith((".jsonl", ".jsonl.gz")):
            yield from _read_json_lines(path, text_field)
        else:
            yield from _read_text_file(path)
    except OSError as error:
        raise UserError(f"--data {path} cannot be read: {error.strerror or error}") from error


def _read_text_file(path: Path) -> Iterator[str]:
    decoder = codecs.getincrementaldecoder("utf-8-sig")()
    block = MAX_TEXT_DOCUMENT_BYTES if path.stat().st_size <= MAX_TEXT_DOCUMENT_BYTES else TEXT_BLOCK_BYTES
    offset = 0
    with path.open("rb") as file:
        while data := file.read(block) + file.readline(block):
            held_back = len(decoder.getstate()[0])  # the first bytes of a character that the last block cut in two
            try:
                text = decoder.decode(data)
            except UnicodeDecodeError as error:
                raise _not_utf8(path, f"byte {offset - held_back + error.start}") from error
            offset += len(data)
            yield text
        try:
            decoder.decode(b"", final=True)
        except UnicodeDecodeError as error:
            raise _not_utf8(path, f"byte {offset}, where the file ends inside a character") from error


def _read_json_lines(path: Path, text_field: str) -> Iterator[str | None]:
    with _open_lines(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if line.isspace():
                    continue
                yield _text_of_line(line, f"--data {path}:{number}", text_field)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            where = f"after line {number}: {error}"
            raise UserError(f"--data {path} is a damaged gzip file ({where}); fetch it again") from error


def _open_lines(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile reads like any binary file
    return path.open("rb")


def _text_of_line(line: bytes, where: str, text_field: str) -> str | None:
    try:
        record = json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where.removeprefix("--data "), f"byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise UserError(
            f"{where} is not valid JSON ({error.msg}, column {error.colno}): a line must be one JSON object"
        ) from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise UserError(f"{where} is not usable JSON ({error}): every line must be one JSON object") from error
    if not isinstance(record, dict):
        raise UserError(f"{where} is a JSON {_json_kind(record)}: every line must be one JSON object")
    if text_field not in record:
        raise _no_field(where, text_field, list(record))
    text = record[text_field]
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(
            f"{where}: field '{text_field}' is a JSON {_json_kind(text)}, not a string: "
            "name the field that holds the text with --text-field"
        )
    return _without_lone_surrogates(text)


def _read_parquet(path: Path, text_field: str) -> Iterator[str | None]:
    import pyarrow as pa  # here, because it takes a quarter of a second that other formats need not pay
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            schema = file.schema_arrow
            if text_field not in schema.names:
                raise _no_field(f"--data {path}", text_field, schema.names)
            kind = schema.field(text_field).type
            value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
            if str(value_kind) not in ("string", "large_string", "string_view"):
                raise UserError(
                    f"--data {path}: column '{text_field}' holds {kind}, not strings: "
                    "name the column that holds the text with --text-field"
                )
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=[text_field]):
                yield from batch.column(0).to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, f"a string of column '{text_field}'") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data {path} is not a sound Parquet file ({reason}); fetch or write it again") from error


def _without_lone_surrogates(text: str) -> str:
    """JSON may spell half of a UTF-16 pair ("\\ud83d"); no tokenizer accepts it, so it becomes U+FFFD."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def _json_kind(value: Any) -> str:
    kinds = {dict: "object", list: "array", str: "string", bool: "boolean", int: "number", float: "number"}
    return kinds.get(type(value), "null")


def _no_field(where: str, text_field: str, fields: list[str]) -> UserError:
    shown = ", ".join(fields[:12]) + (", ..." if len(fields) > 12 else "") or "none"
    return UserError(f"{where} has no field '{text_field}': choose one with --text-field (fields here: {shown})")


def _not_utf8(path: Path | str, where: str) -> UserError:
    return UserError(f"--data {path} is not UTF-8 ({where}): convert it first, for example with iconv -t UTF-8")
