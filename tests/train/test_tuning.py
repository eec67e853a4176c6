"""`--recipe auto` against a machine whose modes take known times."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch

from luffy.train.parts import Done
from luffy.train.parts.tuning import CHANGED, FIRST, RECENT, Mode, Tuning

COMM: Any = SimpleNamespace(mesh=SimpleNamespace(device=torch.device("cpu")), all_gather_world=lambda t: t[None])


def made(may_overlap: bool = True, wires: tuple[str, ...] = ("model", "int8")) -> tuple[Tuning, list[Mode]]:
    used: list[Mode] = []
    return Tuning(used.append, COMM, may_overlap=may_overlap, wires=wires, every=1000), used


def train(tuning: Tuning, seconds: Any, first: int, steps: int, plain: bool = True) -> list[dict[str, Any]]:
    records = []
    for step in range(first, first + steps):
        tuning.before(step)
        done = Done({"seconds": seconds(tuning.mode), "tokens": 10}, plain=plain)
        tuning.after(step, done)
        records.append(done.record)
    return records


def test_it_finds_the_fastest_mode_and_looks_again_when_speed_changes() -> None:
    def seconds(mode: Mode) -> float:
        return (1.0 if mode.seated else 1.2) * (0.8 if mode.overlap else 1.0) * (0.9 if mode.wire == "int8" else 1.0)

    tuning, used = made()
    records = train(tuning, seconds, 0, 120)
    best = Mode(overlap=True, wire="int8")
    assert all(r["mode"] == "seated" for r in records[:FIRST]) and tuning.holder == used[-1] == best
    told = [r["auto"] for r in records if "auto" in r]
    assert [t["chosen"] for t in told] == ["seated, overlapped, rows in int8"]
    assert "as read, rows in int8 took 1.20" in told[0]["note"]
    assert not train(tuning, seconds, 120, 60)[-1].get("auto")  # all as before: nothing is tried
    slower = train(tuning, lambda mode: 2 * CHANGED * seconds(mode), 180, RECENT + 80)
    assert any("auto" in r for r in slower) and tuning.holder == best
    # Steps that are recorded tell nothing of time, and stand in nobody's way.
    tuning, _ = made()
    assert train(tuning, seconds, 0, 120, plain=False)[-1]["mode"] == "seated" and tuning.holder == Mode()


def test_a_resumed_run_takes_no_mode_that_its_options_or_ranks_do_not_allow() -> None:
    kept = {"mode": Mode(seated=False, overlap=True, wire="int8").to_dict(), "next_look": 77}
    tuning, used = made()
    tuning.load(kept)
    assert used == [Mode(False, True, "int8")] and tuning.next_look == 77
    tuning, used = made(may_overlap=False, wires=("model",))
    tuning.load(kept)
    assert used == [tuning.holder] == [Mode(seated=False)]
