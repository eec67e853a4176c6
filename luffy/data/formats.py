"""Reading files of text or of records, one at a time.

Plain text, JSON lines (one object a line, what most crawls and the Hugging Face hub offer), the same gzipped, Parquet,
and a JSON file that holds one array of objects. Each reader is a generator that keeps at most one document (or one
Parquet batch; a `.json` file is read whole) in memory, and turns whatever is wrong with a file into one `UserError`
line that says where: a corpus of millions of lines is only mendable when the message names the file and the line.

`read_texts` yields `None` where a record holds no text (JSON `null`), so that the caller can count what it skips.
"""

import codecs
import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from luffy.errors import UserError

SUFFIXES = (".txt", ".jsonl", ".jsonl.gz", ".parquet")
# Read when it is named itself, or when a folder holds nothing else: .json files beside data describe them mostly.
JSON = ".json"

# A text file up to this size is one document; a larger one (a whole corpus in one file) is read in blocks
# that end at a line, each a document, so that memory stays bounded and some of them can be held out for
# validation.
MAX_TEXT_DOCUMENT_BYTES = 16 << 20
TEXT_BLOCK_BYTES = 1 << 20

_PARQUET_BATCH_ROWS = 256


def read_texts(path: Path, text_field: str) -> Iterator[str | None]:
    """The texts of one file, by its suffix; raises `UserError` for whatever cannot be read."""
    name = path.name.lower()
    with _readable(path):
        if name.endswith(".parquet"):
            yield from _read_parquet_texts(path, text_field)
        elif name.endswith(".txt"):
            yield from _read_text_file(path)
        else:
            for where, record in _read_json(path):
                yield _text_of_record(record, where, text_field)


def read_records(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, for messages; record) of each record of one file; a text file's documents are {"text": ..}.

    Raises `UserError` for whatever cannot be read.
    """
    name = path.name.lower()
    with _readable(path):
        if name.endswith(".parquet"):
            yield from ((f"--data {path}, row {n}", row) for n, row in enumerate(_parquet_rows(path), start=1))
        elif name.endswith(".txt"):
            yield from ((f"--data {path}", {"text": text}) for text in _read_text_file(path))
        else:
            yield from _read_json(path)


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    try:
        yield
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


def _read_json(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    if path.name.lower().endswith(JSON) and path.open("rb").read(256).lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
        where = f"--data {path}"
        for number, record in enumerate(_parse(path.read_bytes(), where, "it must be an array of objects"), start=1):
            yield f"{where}, record {number}", _object(record, f"{where}, record {number}")
        return
    with _open_lines(path) as file:
        number = 0
        try:
            for number, line in enumerate(file, start=1):
                if not line.isspace():
                    where = f"--data {path}:{number}"
                    yield where, _object(_parse(line, where, "a line must be one JSON object"), where)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            where = f"after line {number}: {error}"
            raise UserError(f"--data {path} is a damaged gzip file ({where}); fetch it again") from error


def _open_lines(path: Path) -> IO[bytes]:
    if path.name.lower().endswith(".gz"):
        return gzip.open(path, "rb")  # type: ignore[return-value]  # a GzipFile reads like any binary file
    return path.open("rb")


def _parse(data: bytes, where: str, wanted: str) -> Any:
    try:
        return json.loads(data.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise _not_utf8(where.removeprefix("--data "), f"byte {error.start} of the line") from error
    except json.JSONDecodeError as error:
        raise UserError(f"{where} is not valid JSON ({error.msg}, column {error.colno}): {wanted}") from error
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; nesting without end
        raise UserError(f"{where} is not usable JSON ({error}): every line must be one JSON object") from error


def _object(record: Any, where: str) -> dict[str, Any]:
    if not isinstance(record, dict):
        raise UserError(f"{where} is a JSON {_json_kind(record)}: every line must be one JSON object")
    return record


def _text_of_record(record: dict[str, Any], where: str, text_field: str) -> str | None:
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
    return without_lone_surrogates(text)


def _read_parquet_texts(path: Path, text_field: str) -> Iterator[str | None]:
    import pyarrow as pa

    def check(schema: pa.Schema) -> None:
        if text_field not in schema.names:
            raise _no_field(f"--data {path}", text_field, schema.names)
        kind = schema.field(text_field).type
        value_kind = kind.value_type if pa.types.is_dictionary(kind) else kind
        if str(value_kind) not in ("string", "large_string", "string_view"):
            raise UserError(
                f"--data {path}: column '{text_field}' holds {kind}, not strings: "
                "name the column that holds the text with --text-field"
            )

    yield from (row[text_field] for row in _parquet_rows(path, check, [text_field]))


def _parquet_rows(
    path: Path, check: Callable[[Any], None] = lambda schema: None, columns: list[str] | None = None
) -> Iterator[dict[str, Any]]:
    import pyarrow as pa  # here, because it takes a quarter of a second that other formats need not pay
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            check(file.schema_arrow)
            for batch in file.iter_batches(batch_size=_PARQUET_BATCH_ROWS, columns=columns):
                yield from batch.to_pylist()
    except UnicodeDecodeError as error:
        raise _not_utf8(path, "a string" if columns is None else f"a string of column '{columns[0]}'") from error
    except (pa.ArrowException, OSError) as error:
        if isinstance(error, FileNotFoundError | PermissionError):
            raise
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"--data {path} is not a sound Parquet file ({reason}); fetch or write it again") from error


def without_lone_surrogates(text: str) -> str:
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
