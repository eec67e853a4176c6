"""The folder of a training run: which files lie there, what they mean, how to read and write them safely.

    metrics.jsonl   one object a step: step, loss, tokens, seconds, bytes {a number for each of BYTE_KINDS},
                    and whatever else was known: valid_loss, lr, seconds_split {SECONDS_KINDS},
                    bytes_by_link {LINK_KINDS}, expert_load [layers][experts], ...
    summary.json    one object for the run (see `luffy.train.metrics.RunSummary`)
    config.json     the options it ran with

Bytes are summed over ranks and count only what leaves a rank. A loss that is not finite is written as
`null`: JSON has no word for NaN, and a file that other tools cannot read is no record at all.

Reading lives here, below training, so that a report needs no part of the trainer (and no `torch`).
"""

import contextlib
import dataclasses
import errno
import json
import math
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from luffy.errors import UserError

METRICS_FILE = "metrics.jsonl"
SUMMARY_FILE = "summary.json"
CONFIG_FILE = "config.json"
REPORT_FILE = "report.html"
WANDB_ID_FILE = "wandb-id.txt"  # of `--log wandb`
TOPICS_FILE = "topics.npz"  # beside model.safetensors
PICTURES = ("loss", "loss_by_time", "bytes", "condensation", "links", "traffic", "time_split", "speed", "topics",
            "expert_load")  # NAME.png  # fmt: skip

BYTE_KINDS = (
    "dispatch",
    "combine",
    "dispatch_backward",
    "combine_backward",
    "experts",
    "gradients",
    "control",
)
SECONDS_KINDS = ("attention", "experts", "exchange", "plan", "condense", "gradients", "other")
LINK_KINDS = ("local", "intra_node", "inter_node")

_FULL_DISK = {errno.ENOSPC, errno.EDQUOT}
_UNWRITABLE = {errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR}


@contextlib.contextmanager
def writing_to(path: str | os.PathLike[str]) -> Iterator[None]:
    """Turn the failures of a disk that a person can mend into one line that names `--out`."""
    try:
        yield
    except OSError as error:
        if error.errno in _FULL_DISK:
            raise UserError(
                f"--out: the disk that holds {path} is full; free some space and continue with --resume,"
                " or name a folder on another disk"
            ) from error
        if error.errno in _UNWRITABLE:
            raise UserError(
                f"--out: cannot write {path} ({os.strerror(error.errno)}); name a folder you may write to"
            ) from error
        raise


def plain(value: Any) -> Any:
    """`value` in JSON's own types: arrays and tensors become lists, non-finite floats become None."""
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if hasattr(value, "tolist"):  # numpy and torch, scalars and arrays alike
        return plain(value.tolist())
    if isinstance(value, set | frozenset):
        return sorted(plain(item) for item in value)
    if isinstance(value, Sequence) and not isinstance(value, bytes | bytearray):
        return [plain(item) for item in value]
    return str(value)  # paths, dtypes, enums: their own name


def write_bytes_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Replace `path` whole or not at all: a reader, or a crash, never meets half a file."""
    path = Path(path)
    with writing_to(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, 0o644)  # mkstemp makes files for its owner only; a run is there to be shared
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(temporary)
            raise


def write_json_atomic(path: str | os.PathLike[str], obj: Any) -> None:
    """Write `obj` as indented JSON, atomically."""
    text = json.dumps(plain(obj), indent=2, ensure_ascii=False, allow_nan=False)
    write_bytes_atomic(path, (text + "\n").encode())


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """One JSON object; a missing file is an empty one."""
    path = Path(path)
    try:
        obj = json.loads(path.read_bytes())
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise UserError(f"--out: {path} is not JSON ({error}); remove it, or name another folder") from error
    if not isinstance(obj, dict):
        raise UserError(f"--out: {path} does not hold one JSON object; remove it, or name another folder")
    return obj


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a `metrics.jsonl`, without the torn last line that a killed process may leave.

    A truncated object is never valid JSON (its closing brace is missing), so a last line that parses is
    complete even without its newline. Damage anywhere else did not come from a kill, and is reported.
    """
    path = Path(path)
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError as error:
        raise UserError(f"--out: {path} does not exist; name the folder of a training run") from error
    while lines and not lines[-1].strip(b"\0 \r\t"):  # NULs: blocks that a power cut left unwritten
        lines.pop()
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
            if not isinstance(record, dict) or not isinstance(record.get("step"), int):
                raise ValueError("no object with a step")
        except ValueError as error:
            if number == len(lines):
                break
            raise UserError(
                f"--out: {path}, line {number}, is not a metrics record; mend it or name another folder"
            ) from error
        records.append(record)
    return records


def column(records: Sequence[Mapping[str, Any]], *keys: str) -> np.ndarray:
    """One number a record as float64, NaN where it is absent: `column(records, "bytes", "dispatch")`."""
    values = np.full(len(records), np.nan)
    for index, record in enumerate(records):
        item: Any = record
        for key in keys:
            item = item.get(key) if isinstance(item, Mapping) else None
        if isinstance(item, int | float) and not isinstance(item, bool):
            values[index] = item
    return values


def warmup_steps(num_steps: int) -> int:
    """Steps left out of every mean of time: the first ones compile, allocate, connect and measure."""
    return min(3, num_steps // 4)


def tokens_per_second(tokens: Sequence[float] | np.ndarray, seconds: Sequence[float] | np.ndarray) -> float:
    """The speed of a run from its steps, wherever it is shown: tokens of all ranks over seconds, warm-up left out."""
    skip = warmup_steps(len(seconds))
    timed = float(np.nansum(seconds[skip:]))
    return float(np.nansum(tokens[skip:])) / timed if timed > 0 else 0.0


def moved_num_bytes(records: Sequence[Mapping[str, Any]]) -> np.ndarray:
    """What a run moved, wherever it is shown: bytes of all kinds that left a rank, after each of its steps."""
    by_kind = [column(records, "bytes", kind) for kind in BYTE_KINDS]
    return np.cumsum(np.nansum(by_kind, axis=0)) if records else np.zeros(0)


def totals(records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What a run's records add up to: the part of a summary that needs nothing but its metrics.

    `bytes` and `seconds` are sums over all steps. `valid_loss` is that of the last evaluation.
    """
    seconds, tokens = column(records, "seconds"), column(records, "tokens")
    skip = warmup_steps(len(records))
    split = {kind: float(np.nansum(column(records, "seconds_split", kind))) for kind in SECONDS_KINDS}
    # What no stage claims is `other`, so the parts add up to the whole (overlapping parts may exceed it).
    claimed = sum(split.values())
    split["other"] += max(0.0, float(np.nansum(seconds)) - claimed)
    losses, valid = column(records, "loss"), column(records, "valid_loss")
    kept = column(records, "condense", "kept")
    valid = valid[np.isfinite(valid)]
    return {
        "steps": int(records[-1]["step"]) if records else 0,
        "final_loss": plain(float(losses[-1])) if records else None,
        "valid_loss": float(valid[-1]) if valid.size else None,
        "tokens_per_second": tokens_per_second(tokens, seconds),
        "bytes": {kind: int(np.nansum(column(records, "bytes", kind))) for kind in BYTE_KINDS},
        "seconds": split,
        "total_tokens": int(np.nansum(tokens)),
        "total_seconds": float(np.nansum(seconds)),
        "warmup_steps": skip,
        **({"copies_kept": float(np.nanmean(kept))} if np.isfinite(kept).any() else {}),
    }


@dataclasses.dataclass(frozen=True)
class Run:
    """A finished (or stopped) run as read from its folder."""

    out_dir: Path
    records: list[dict[str, Any]]
    summary: dict[str, Any]
    config: dict[str, Any]

    @property
    def steps(self) -> np.ndarray:
        return column(self.records, "step")

    def lookup(self, *names: str) -> Any:
        """The first of `names` that the summary, its environment or the options know."""
        places = (self.summary, self.summary.get("environment"), self.config, self.config.get("options"))
        for name in names:
            for place in places:
                if isinstance(place, Mapping) and place.get(name) is not None:
                    return place[name]
        return None


def read_run(out_dir: str | os.PathLike[str], option: str = "--out") -> Run:
    """Everything a report needs. A run that stopped before its summary is summed up from its metrics.

    option: that named the folder. UserError where it holds no run, or a damaged one.
    """
    out_dir = Path(out_dir)
    try:
        records = read_metrics(out_dir / METRICS_FILE)
        if not records:
            raise UserError(f"--out: {out_dir / METRICS_FILE} holds no step yet; train at least one step first")
        summary = totals(records) | read_json(out_dir / SUMMARY_FILE)
        return Run(out_dir=out_dir, records=records, summary=summary, config=read_json(out_dir / CONFIG_FILE))
    except UserError as error:
        raise UserError(f"{option}: {str(error).removeprefix('--out: ')}") from error
