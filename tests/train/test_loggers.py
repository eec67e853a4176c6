"""`--log wandb,mlflow`: what reaches those tools, offline, and what is said where one is missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path
from typing import Any

import pytest

from luffy.errors import UserError
from luffy.train.loggers import check_log, open_loggers
from luffy.train.metrics import MetricsWriter
from luffy.train.options import TrainOptions
from luffy.train.outfolder import claim_out

RECORD: dict[str, Any] = {
    "step": 7, "loss": 2.5, "tokens": 100, "seconds": 0.5,
    "bytes": dict.fromkeys(("dispatch", "combine", "dispatch_backward", "combine_backward", "experts", "gradients",
                            "control"), 8),
}  # fmt: skip


def standing_in(monkeypatch: pytest.MonkeyPatch, calls: list[tuple[str, Any]]) -> None:
    """Modules with the few functions of wandb and mlflow that are called."""

    def noted(name: str) -> Any:
        return lambda *args, **kwargs: calls.append((name, args or kwargs))

    run = types.SimpleNamespace(log=lambda values, step: calls.append(("wandb.log", (values, step))),
                                finish=noted("wandb.finish"))  # fmt: skip
    wandb = types.ModuleType("wandb")
    wandb.api = types.SimpleNamespace(api_key=None)  # type: ignore[attr-defined]
    wandb.Settings = lambda **settings: settings  # type: ignore[attr-defined]
    wandb.init = lambda **settings: calls.append(("wandb.init", settings)) or run  # type: ignore[attr-defined, func-returns-value]
    mlflow = types.ModuleType("mlflow")
    for name in ("set_tracking_uri", "set_experiment", "start_run", "log_params", "end_run"):
        setattr(mlflow, name, noted(f"mlflow.{name}"))
    mlflow.log_metrics = lambda values, step: calls.append(("mlflow.log", (values, step)))  # type: ignore[attr-defined]
    for module in (wandb, mlflow):
        module.__spec__ = types.SimpleNamespace()  # type: ignore[assignment]
        monkeypatch.setitem(sys.modules, module.__name__, module)
    for name in ("WANDB_MODE", "WANDB_API_KEY", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(name, raising=False)


def test_every_step_reaches_both_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, Any]] = []
    standing_in(monkeypatch, calls)
    loggers = open_loggers("wandb,mlflow", tmp_path, {"lr": 0.1})
    with MetricsWriter(tmp_path, None, tensorboard=False, loggers=loggers) as writer:
        writer.write(RECORD)
    first = dict(calls)
    assert first["wandb.init"]["mode"] == "offline" and first["wandb.init"]["config"] == {"lr": 0.1}
    assert first["mlflow.set_tracking_uri"] == (f"sqlite:///{tmp_path}/mlflow.db",)
    for name in ("wandb.log", "mlflow.log"):
        values, step = first[name]
        assert step == 7 and values["loss"] == 2.5 and values["tokens_per_second"] == 200
        assert values["bytes/dispatch"] == 8
    assert [name for name, _ in calls][-2:] == ["wandb.finish", "mlflow.end_run"]
    # A resume continues the same run of wandb; a mode that the user chose is kept.
    monkeypatch.setenv("WANDB_MODE", "online")
    open_loggers("wandb", tmp_path, {})
    assert calls[-1][1]["id"] == first["wandb.init"]["id"] and calls[-1][1]["mode"] is None
    # A run that takes its place is another one: wandb drops steps below the last it has seen.
    claim_out(TrainOptions(out=str(tmp_path), overwrite=True))
    open_loggers("wandb", tmp_path, {})
    assert calls[-1][1]["id"] != first["wandb.init"]["id"]


def test_what_is_missing_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="--log 'comet': name some of wandb, mlflow"):
        check_log("comet")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match="--log wandb: it is not installed; pip install wandb"):
        check_log("wandb")
    monkeypatch.undo()
    standing_in(monkeypatch, [])
    monkeypatch.setattr(sys.modules["wandb"], "init", lambda **_: 1 / 0)
    with pytest.raises(UserError, match=r"--log wandb: it cannot be started \(division by zero\)"):
        open_loggers("wandb", tmp_path, {})
