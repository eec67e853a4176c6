"""Curves elsewhere: Weights & Biases and MLflow, beside metrics.jsonl and TensorBoard (`--log wandb,mlflow`).

Each is that tool's own client, which reads its own environment variables (WANDB_PROJECT, MLFLOW_TRACKING_URI, ...).
With none set both write into the run's folder and need no network: OUT/wandb (`wandb sync` sends it later) and
OUT/mlflow.db.
"""

from __future__ import annotations

import importlib.util
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from luffy.errors import UserError
from luffy.report.runs import WANDB_ID_FILE, writing_to


class Logger(Protocol):
    def write(self, values: Mapping[str, float], step: int) -> None: ...

    def close(self) -> None: ...


class WandbLogger:
    """One run of Weights & Biases for one --out, which a resume continues."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import wandb

        offline = "WANDB_MODE" not in os.environ and not _wandb_key()
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "luffy"),
            name=os.environ.get("WANDB_NAME", out.name),
            id=_run_id(out),
            resume="allow",
            dir=str(out),
            config=dict(config),
            mode="offline" if offline else None,
            settings=wandb.Settings(console="off", silent=True),
        )

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._run.log(dict(values), step=step)

    def close(self) -> None:
        self._run.finish()


class MlflowLogger:
    """One run of MLflow for each start."""

    def __init__(self, out: Path, config: Mapping[str, Any]) -> None:
        import mlflow

        if not os.environ.get("MLFLOW_TRACKING_URI"):
            mlflow.set_tracking_uri(f"sqlite:///{out.resolve()}/mlflow.db")
        mlflow.set_experiment(os.environ.get("MLFLOW_EXPERIMENT_NAME", "luffy"))
        self._mlflow = mlflow
        mlflow.start_run(run_name=os.environ.get("MLFLOW_RUN_NAME", out.name))
        mlflow.log_params({name: str(value)[:500] for name, value in config.items()})

    def write(self, values: Mapping[str, float], step: int) -> None:
        self._mlflow.log_metrics({_mlflow_name(name): value for name, value in values.items()}, step=step)

    def close(self) -> None:
        self._mlflow.end_run()


_LOGGERS: dict[str, Any] = {"wandb": WandbLogger, "mlflow": MlflowLogger}


def check_log(text: str | None) -> tuple[str, ...]:
    """`wandb,mlflow` -> names. UserError for one that is unknown, or not installed."""
    names = tuple(name.strip() for name in text.split(",")) if text else ()
    for name in names:
        if name not in _LOGGERS:
            raise UserError(f"--log {name!r}: name some of {', '.join(_LOGGERS)} (TensorBoard is --tensorboard)")
        if importlib.util.find_spec(name) is None:
            raise UserError(f"--log {name}: it is not installed; pip install {name}")
    return names


def open_loggers(text: str | None, out: Path, config: Mapping[str, Any]) -> list[Logger]:
    """Those that `--log` names. UserError where one cannot be opened."""
    opened: list[Logger] = []
    for name in check_log(text):
        try:
            opened.append(_LOGGERS[name](out, config))
        except Exception as error:  # whatever its client does
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"--log {name}: it cannot be started ({lines[0][:200]})") from error
    return opened


def _run_id(out: Path) -> str:
    """The name of the run in `out`, kept there: a resume goes on under it, a new run takes a new one."""
    path = out / WANDB_ID_FILE
    if not path.exists():
        with writing_to(path):
            path.write_text(uuid.uuid4().hex[:16], encoding="utf-8")
    return path.read_text(encoding="utf-8").strip()


def _wandb_key() -> bool:
    import wandb

    return bool(os.environ.get("WANDB_API_KEY") or getattr(wandb.api, "api_key", None))


def _mlflow_name(name: str) -> str:
    """MLflow takes letters, digits and a few signs."""
    return "".join(c if c.isalnum() or c in "_-./ " else "_" for c in name)
