"""No command writes over its input: what is read is compared with what will be written, before anything is."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from luffy.errors import UserError

# What a run replaces in its --out (luffy.report.runs, luffy.hf.finetune).
RUN_OUTPUTS = (
    "metrics.jsonl", "summary.json", "config.json", "model.safetensors", "checkpoints", "tensorboard", "trace",
    "tokens", "model", "adapter", "model.tmp", "model.old", "model.safetensors.tmp",
)  # fmt: skip


def _within(inner: Path, outer: Path) -> bool:
    return inner == outer or outer in inner.parents


def keep_apart(written: Path | str, inputs: Mapping[str, Path | str | None], option: str = "--out") -> None:
    """UserError if replacing `written`, a file or a folder with all that is in it, would replace one of `inputs`.

    inputs: by the option that names them; None and what does not exist are left out. Links are followed.
    """
    target = Path(written).resolve()
    for name, value in inputs.items():
        if value is not None and Path(value).exists() and _within(Path(value).resolve(), target):
            raise UserError(f"{option} {written} would replace its own input, {name} {value}; choose another {option}")


def keep_run_apart(out: Path | str, inputs: Mapping[str, Path | str | None], folders: tuple[str, ...] = ()) -> None:
    """UserError if a run in `out` would write over one of `inputs`, or among the files that those options name.

    folders: of `inputs`, the options that may name a folder whose files are all read: a run in there would be read
    the next time.
    """
    for name in RUN_OUTPUTS:
        keep_apart(Path(out) / name, inputs)
    for name in folders:
        value = inputs.get(name)
        if value is not None and Path(value).is_dir() and _within(Path(out).resolve(), Path(value).resolve()):
            raise UserError(
                f"--out {out} lies in {name} {value}, where the run's own files would be read as data; choose a "
                "folder outside"
            )
