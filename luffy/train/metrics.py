"""What a training run writes down: a line a step, curves, and a summary.

`metrics.jsonl` is the record; TensorBoard's curves and the summary are derived from it. Two properties
matter more than anything else here:

* **A kill loses nothing.** Each step is one `write` to an unbuffered file, so that the record on disk is
  never more than one line behind the training, and at worst ends in a torn line.
* **A resumed run reads as if it had never stopped.** Training restarts from a checkpoint of step K, while
  the record may already go further. Opening the writer with `resume_step=K` cuts every later line
  (atomically: the old file stays until the new one is whole); TensorBoard forgets the same steps.

The writer belongs to one rank; bytes and losses reach it already summed over ranks.
"""

import contextlib
import dataclasses
import json
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from luffy.report.runs import (
    BYTE_KINDS,
    METRICS_FILE,
    SECONDS_KINDS,
    SUMMARY_FILE,
    plain,
    read_json,
    read_metrics,
    totals,
    write_bytes_atomic,
    write_json_atomic,
    writing_to,
)
from luffy.train.loggers import Logger

__all__ = [
    "BYTE_KINDS",
    "SECONDS_KINDS",
    "MetricsWriter",
    "RunSummary",
    "describe_machine",
    "read_metrics",
    "write_json_atomic",
]

TENSORBOARD_DIR = "tensorboard"
_REQUIRED = ("step", "loss", "tokens", "seconds", "bytes")


def _json_line(record: Mapping[str, Any]) -> bytes:
    return (json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n").encode()


def flatten_scalars(record: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers of a nested record under names joined by '/': `("bytes/dispatch", 4096)`.

    Lists have no curve, except `expert_load` [layers][experts]: each layer gives its busiest expert's load over
    the mean (1 is perfect balance, the number of experts is total collapse).
    """
    for key, value in record.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            yield from flatten_scalars(value, f"{name}/")
        elif key == "expert_load" and value:
            for layer, loads in enumerate(value):
                if mean := sum(loads) / max(1, len(loads)):
                    yield f"{name}/layer_{layer:02d}_max_over_mean", max(loads) / mean
        elif isinstance(value, int | float):
            yield name, float(value)


class MetricsWriter:
    """Writes `out_dir/metrics.jsonl` and `out_dir/tensorboard`; use it as a context manager.

    `resume_step=None` starts a new record (one that is already in the folder is replaced); `resume_step=K`
    keeps steps up to K and continues after them.
    """

    def __init__(
        self,
        out_dir: str | os.PathLike[str],
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        loggers: Sequence[Logger] = (),
    ) -> None:
        self._loggers = loggers
        self.out_dir = Path(out_dir)
        self.path = self.out_dir / METRICS_FILE
        with writing_to(self.out_dir):
            self.out_dir.mkdir(parents=True, exist_ok=True)
            # A summary describes a finished run, and from here on this one is not.
            (self.out_dir / SUMMARY_FILE).unlink(missing_ok=True)
        if resume_step is not None:
            self._cut_after(resume_step)
        with writing_to(self.path):
            # Unbuffered: a failed write leaves nothing behind that would fail again at close.
            self._file = open(self.path, "wb" if resume_step is None else "ab", buffering=0)  # noqa: SIM115
        self._curves: Any = None
        if tensorboard:
            # Imported here: it takes a second, and only the rank that writes has to wait for it.
            from torch.utils.tensorboard import SummaryWriter

            with writing_to(self.out_dir / TENSORBOARD_DIR):
                self._curves = SummaryWriter(
                    str(self.out_dir / TENSORBOARD_DIR),
                    purge_step=0 if resume_step is None else resume_step + 1,
                    flush_secs=10,
                )

    def _cut_after(self, resume_step: int) -> None:
        """Drop what was recorded after the checkpoint, and the torn line that a kill may have left."""
        if not self.path.exists():
            return
        kept = [record for record in read_metrics(self.path) if record["step"] <= resume_step]
        content = b"".join(map(_json_line, kept))
        if content != self.path.read_bytes():
            write_bytes_atomic(self.path, content)

    def write(self, record: Mapping[str, Any]) -> None:
        """Record one step. Beyond the required keys any JSON-like value is welcome, arrays included."""
        missing = [key for key in _REQUIRED if key not in record]
        missing += [f"bytes.{kind}" for kind in BYTE_KINDS if kind not in record.get("bytes", {})]
        if missing:
            raise ValueError(f"a metrics record lacks {', '.join(missing)}")
        record = plain(record)
        line = memoryview(_json_line(record))
        with writing_to(self.path):
            while line:  # an unbuffered write may take only a part
                line = line[self._file.write(line) :]
        if self._curves is None and not self._loggers:
            return
        step = record["step"]
        values = {name: value for name, value in flatten_scalars(record) if name != "step"}
        if record["seconds"]:
            values["tokens_per_second"] = record["tokens"] / record["seconds"]
        for logger in self._loggers:
            logger.write(values, step)
        if self._curves is not None:
            with writing_to(self.out_dir / TENSORBOARD_DIR):
                for name, value in values.items():
                    self._curves.add_scalar(name, value, step)

    def sync(self) -> None:
        """Put everything on the disk itself, so that no checkpoint taken after it outlives its record."""
        with writing_to(self.path):
            os.fsync(self._file.fileno())
            if self._curves is not None:
                self._curves.flush()

    def close(self) -> None:
        """Close both files; a second call does nothing."""
        self._file.close()
        for logger in self._loggers:
            logger.close()
        self._loggers = ()
        if self._curves is not None:
            curves, self._curves = self._curves, None
            with writing_to(self.out_dir / TENSORBOARD_DIR):
                curves.close()

    def __enter__(self) -> "MetricsWriter":
        return self

    def __exit__(self, exc_type: type[BaseException] | None, *_: object) -> None:
        # While another error is on its way, a failure to close would only hide it.
        with contextlib.suppress(Exception) if exc_type else contextlib.nullcontext():
            self.close()


@dataclass(frozen=True)
class RunSummary:
    """`summary.json`: what a run came to. `bytes` (of all ranks) and `seconds` are sums over its steps.

    `extra` joins the same JSON object (`seed`, `environment`, ...) and may not use the names below.
    """

    recipe: str
    model: str
    world_size: int
    steps: int
    final_loss: float | None
    valid_loss: float | None
    tokens_per_second: float
    peak_memory_bytes: int
    bytes: Mapping[str, int]
    seconds: Mapping[str, float]
    extra: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def from_records(
        cls,
        records: Sequence[Mapping[str, Any]],
        *,
        recipe: str,
        model: str,
        world_size: int,
        peak_memory_bytes: int,
        extra: Mapping[str, Any] | None = None,
    ) -> "RunSummary":
        """Sum up `metrics.jsonl`: after a resume, that covers the steps of before as well."""
        sums = totals(records)
        named = {f.name for f in dataclasses.fields(cls)}
        rest = {key: value for key, value in sums.items() if key not in named}
        return cls(
            recipe=recipe,
            model=model,
            world_size=world_size,
            peak_memory_bytes=peak_memory_bytes,
            extra=rest | dict(extra or {}),
            **{key: value for key, value in sums.items() if key in named},
        )

    def to_dict(self) -> dict[str, Any]:
        own = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "extra"}
        if clash := own.keys() & self.extra.keys():
            raise ValueError(f"extra would hide {', '.join(sorted(clash))} of the summary")
        return plain(own | dict(self.extra))

    @classmethod
    def from_dict(cls, obj: Mapping[str, Any]) -> "RunSummary":
        named = [f.name for f in dataclasses.fields(cls) if f.name != "extra"]
        rest = {key: value for key, value in obj.items() if key not in named}
        return cls(**{name: obj[name] for name in named}, extra=rest)

    def write(self, out_dir: str | os.PathLike[str]) -> Path:
        path = Path(out_dir) / SUMMARY_FILE
        write_json_atomic(path, self.to_dict())
        return path

    @classmethod
    def read(cls, out_dir: str | os.PathLike[str]) -> "RunSummary":
        return cls.from_dict(read_json(Path(out_dir) / SUMMARY_FILE))


def _processor_name() -> str:
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        for line in file:
            if line.startswith("model name"):
                return " ".join(line.partition(":")[2].split())
    return platform.processor() or platform.machine()


def describe_machine(device: str) -> dict[str, Any]:
    """The `environment` of a summary: without it no time in a report can be compared with another.

    It names the hardware, not the host: a host's name tells a reader nothing and may be nobody's business.
    """
    import torch

    on_gpu = device == "cuda" and torch.cuda.is_available()
    name = torch.cuda.get_device_name() if on_gpu else _processor_name()
    return {
        "device": device,
        "device_name": name,
        "host": f"{_processor_name()}, {os.cpu_count()} cores, {platform.system()} {platform.release()}",
        "python_version": platform.python_version(),
        "torch_version": torch.__version__,
    }
