"""`--recipe auto` on real ranks: it tries, chooses, says so, changes nothing but time, and goes on after a resume."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

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
    plain = train(tmp_path / "plain", "--recipe", "vanilla_dedup", "--steps", "17", *common)
    out = tmp_path / "auto"
    train(out, "--recipe", "auto", "--auto-every", "20", "--steps", "17", *common)
    records = train(out, "--recipe", "auto", "--auto-every", "20", "--steps", "24", "--resume", *common)
    choices = {r["step"]: r["auto"] for r in records if "auto" in r}
    assert sorted(choices) == [14, 20]
    for choice in choices.values():
        assert choice["got_seconds"] > 0 and len(choice["residency"]) == 2
        assert {"vanilla_dedup", "janus", "fastermoe", "migrate"} <= set(choice["predicted_seconds"])
    assert choices[20]["mode"] == choices[14]["chosen"]  # the choice survived the resume
    # Trials: steps 6-8 fetch experts, and nothing but experts.
    assert records[6]["bytes"]["experts"] > 0 and records[6]["bytes"]["dispatch"] == 0
    for a, b in zip(plain, records[:17], strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)


def test_a_wire_format_is_tried_where_the_user_allows_one(data: str, tmp_path: Path) -> None:
    records = train(tmp_path / "auto", "--recipe", "auto", "--wire", "int8", "--steps", "18", "--data", data,
                    "--cache-dir", str(tmp_path / "cache"))  # fmt: skip
    (choice,) = [r["auto"] for r in records if "auto" in r]
    assert "vanilla_dedup+int8" in choice["predicted_seconds"] and "migrate+int8" not in choice["predicted_seconds"]
    plain, narrow = records[3]["bytes"]["dispatch"], records[15]["bytes"]["dispatch"]
    assert 0 < narrow < 0.4 * plain  # float64 rows of 32, in a byte each and a scale


def test_auto_refuses_what_it_cannot_weigh(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--recipe", "auto", "--condense", "static:0.9"])
    assert stopped.value.code == 2
    assert "leave out --condense" in capsys.readouterr().err
