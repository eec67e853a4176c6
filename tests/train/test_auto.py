"""`--recipe auto` on real ranks: it tries, chooses, says so, changes nothing but time, and goes on after a resume."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from luffy.plan.choose import Mode
from luffy.train.auto import AutoControl
from luffy.train.cli import main

SMALL = ["--ranks", "2", "--layers", "2", "--hidden-size", "32", "--heads", "4", "--expert-hidden-size", "32",
         "--dense-hidden-size", "32", "--vocab-size", "512", "--sequence-length", "32", "--batch-size", "4", "--dtype",
         "float64", "--eval-every", "0", "--eval-batches", "1", "--no-tensorboard", "--device", "cpu",
         "--no-profile-attention"]  # fmt: skip


def train(out: Path, *more: str) -> list[dict]:
    main(["train", *SMALL, "--out", str(out), *more])
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("text")
    words = [f"word{i * i % 97} and {i % 31}" for i in range(6000)]
    for name in ("a", "b"):
        (folder / f"{name}.txt").write_text("\n\n".join(" ".join(words[i : i + 40]) for i in range(0, 6000, 40)))
    return str(folder)


def test_auto_tries_chooses_and_changes_nothing_else(data: str, tmp_path: Path) -> None:
    common = ["--data", data, "--cache-dir", str(tmp_path / "cache")]
    plain = train(tmp_path / "plain", "--recipe", "vanilla_dedup", "--steps", "37", *common)
    out = tmp_path / "auto"
    train(out, "--recipe", "auto", "--auto-every", "40", "--steps", "37", *common)
    records = train(out, "--recipe", "auto", "--auto-every", "40", "--steps", "42", "--resume", *common)
    choices = {r["step"]: r["auto"] for r in records if "auto" in r}
    looks = {step: c for step, c in choices.items() if "predicted_seconds" in c}
    assert sorted(looks) == [18, 40]
    for choice in looks.values():
        assert choice["got_seconds"] > 0 and len(choice["residency"]) == 2
        assert {"vanilla_dedup", "janus", "fastermoe", "migrate"} <= set(choice["predicted_seconds"])
    # What was chosen met what ran in a duel, and the faster was kept, through the resume too.
    first, kept = looks[18], looks[18]["mode"]
    if first["chosen"] != first["mode"]:
        fought = choices[18 + 16]
        assert {fought["mode"], fought["challenger"]} == {first["mode"], first["chosen"]}
        kept = fought["chosen"]
        faster = fought["challenger_seconds"] < fought["got_seconds"]
        assert kept == (fought["challenger"] if faster else fought["mode"])
    assert looks[40]["mode"] == kept
    # Trials: steps 5, 6, 15 and 16 fetch experts, and nothing but experts.
    for step in (5, 6, 15, 16):
        assert records[step - 1]["bytes"]["experts"] > 0 and records[step - 1]["bytes"]["dispatch"] == 0
    for a, b in zip(plain, records[:37], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)


class _Fixed(AutoControl):
    """One rank whose model of costs says what a test wants."""

    def __init__(self, truth: dict[str, float]) -> None:
        modes = [Mode(False, (kind,) * 2) for kind in ("static", "fetch", "shadow")] + [Mode(True, ("static",) * 2)]
        self.truth = truth
        layers = [SimpleNamespace(recipe=None)] * 2
        self.model = SimpleNamespace(moe_layers=layers)  # type: ignore[assignment]
        self.mode, self.fresh, self.began, self.turns, self.duel = modes[0], False, 0, [], {}
        self.challenger = self.holder = self.mode
        self.modes = {m.name: m for m in modes}

    def set(self, mode: Mode) -> None:
        self.mode = mode

    def _agree(self, index: int) -> int:
        return index


@pytest.mark.parametrize(("challenger", "kept"), [("janus", "janus"), ("migrate", "vanilla_dedup")])
def test_a_duel_keeps_what_is_faster_and_a_steady_trend_does_not_decide_it(challenger: str, kept: str) -> None:
    control = _Fixed({"vanilla_dedup": 1.0, "janus": 0.99, "migrate": 1.01})
    control.first = 0
    mode = control.modes[challenger]
    control.start_duel(mode)
    for step in range(16):
        control.before(step)
        seconds = control.truth[control.mode.name] - 0.02 * step  # the run grows faster all the while
        record = {"seconds": seconds, "seconds_split": {"attention": 0.0}}
        control._attention = []
        out = control.after(step, record, [])
    assert out is not None and out["chosen"] == control.mode.name == kept
    assert not control.duel


def test_a_wire_format_is_tried_where_the_user_allows_one(data: str, tmp_path: Path) -> None:
    records = train(tmp_path / "auto", "--recipe", "auto", "--wire", "int8", "--steps", "22", "--data", data,
                    "--cache-dir", str(tmp_path / "cache"))  # fmt: skip
    (choice,) = [r["auto"] for r in records if "auto" in r]
    assert "vanilla_dedup+int8" in choice["predicted_seconds"] and "migrate+int8" not in choice["predicted_seconds"]
    plain, narrow = records[3]["bytes"]["dispatch"], records[11]["bytes"]["dispatch"]
    assert 0 < narrow < 0.4 * plain  # float64 rows of 32, in a byte each and a scale


def test_auto_refuses_what_it_cannot_weigh(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--recipe", "auto", "--condense", "static:0.9"])
    assert stopped.value.code == 2
    assert "leave out --condense" in capsys.readouterr().err
