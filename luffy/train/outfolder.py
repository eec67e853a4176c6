"""The folder of a run: never write over a run that nobody said was to be replaced, nor beside one that lives.

The same checks hold however ranks were started. The first rank makes them once more under a lock, which it holds until
its process ends: the kernel lets go of it, whatever ends that process.
"""

from __future__ import annotations

import fcntl
import json
import os
import platform
import shutil
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from luffy.errors import UserError
from luffy.lab.place import process_identity
from luffy.report.runs import CONFIG_FILE, METRICS_FILE, PICTURES, REPORT_FILE, SUMMARY_FILE, TOPICS_FILE, WANDB_ID_FILE
from luffy.train.checkpoint_files import list_checkpoints
from luffy.train.metrics import TENSORBOARD_DIR
from luffy.train.options import TrainOptions
from luffy.train.ranklog import LOGS_DIR
from luffy.train.runfile import RUN_FILE

LOCK_FILE = "lock.json"
# What a run writes. --overwrite removes these and nothing else: the folder may hold files of its user.
WRITTEN = (METRICS_FILE, SUMMARY_FILE, CONFIG_FILE, REPORT_FILE, RUN_FILE, TOPICS_FILE, WANDB_ID_FILE,
           "model.safetensors", "checkpoints", "trace", TENSORBOARD_DIR, LOGS_DIR, "model", "adapter",
           *(f"{name}.png" for name in PICTURES))  # fmt: skip
_SOURCES = ("data", "model", "start_weights", "tokenizer")
_held: dict[Path, Any] = {}


def check_out(options: TrainOptions) -> None:
    """Raise UserError where the run must not begin in --out; make the folder."""
    out = Path(options.out)
    if out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; choose a folder")
    found = list_checkpoints(out / "checkpoints")
    if ((out / METRICS_FILE).exists() or found) and not (options.resume or options.overwrite):
        has = f" (checkpoint {found[-1].name})" if found else ""
        raise UserError(f"--out {out} already holds a run{has}; add --resume, --overwrite, or choose another folder")
    if options.overwrite:
        _check_sources(options, out)
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
    if not os.access(out, os.W_OK):
        raise UserError(f"--out {out} is not writable")


def _check_sources(options: TrainOptions, out: Path) -> None:
    """--overwrite must not remove what this run is to read."""
    doomed = [(out / name).resolve() for name in WRITTEN]
    for name in _SOURCES:
        value = getattr(options, name)
        path = Path(value).resolve() if value else None
        if path is not None and any(d == path or d in path.parents for d in doomed):
            option = "--" + name.replace("_", "-")
            raise UserError(f"--overwrite would remove {option} {value}, which lies in --out; choose another --out")


def take_out(options: TrainOptions, restarted: bool) -> bool:
    """`claim_out`; whether the run in the folder is to be continued because an earlier attempt of this launch began it.

    restarted: ranks were started again by their launcher. A run that this launch has not begun is not continued for
    that: what was refused, or was to be overwritten, still is.
    """
    goes_on = restarted and _is_ours(Path(options.out) / LOCK_FILE)
    claim_out(replace(options, resume=True, overwrite=False) if goes_on else options)
    return goes_on


def claim_out(options: TrainOptions) -> None:
    """Take the folder for this process: `check_out` under its lock, and with --overwrite remove the old run.

    Raises UserError that names host and process where another run holds it.
    """
    out = Path(options.out)
    check_out(options)
    _lock(out)
    check_out(options)
    if options.overwrite:
        for path in (out / name for name in WRITTEN):
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
    _sign(out, _launch())


def _launch() -> dict[str, str]:
    """What tells this launch from others, the same in all of its attempts: torchrun's name for it, unless that is the
    one of all, and the process that starts ranks on this host."""
    run, parent = os.environ.get("TORCHELASTIC_RUN_ID", "none"), process_identity(os.getppid())
    return ({} if run == "none" else {"run": run}) | ({} if parent is None else {"parent": parent})


def _is_ours(path: Path) -> bool:
    """Whether this launch has begun the run beside the lock file `path`, as far as anybody can tell."""
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    mine, theirs = _launch(), said.get("launch")
    if theirs is None:
        return False
    moved = said.get("host") != platform.node()  # rank 0 was elsewhere before
    return not mine or moved or bool(mine.items() & theirs.items())


def _lock(out: Path) -> None:
    path = out / LOCK_FILE
    if path in _held:
        return
    file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise UserError(f"--out {out} is in use by {_holder(path)}; stop that run or choose another folder") from None
    except OSError:  # a file system without locks
        pass
    _held[path] = file
    _sign(out)


def _sign(out: Path, launch: dict[str, str] | None = None) -> None:
    """Say in the lock file who holds the folder; launch: once what it holds is of this launch alone."""
    file = _held[out / LOCK_FILE]
    file.truncate(0)
    about = {"host": platform.node(), "pid": os.getpid(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
    json.dump(about if launch is None else about | {"launch": launch}, file)
    file.flush()


def _holder(path: Path) -> str:
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
        return f"process {said['pid']} on host {said['host']}, since {said['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return "another run"
