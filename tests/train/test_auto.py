"""`--recipe auto`: what is tried, what that may cost, what is kept; on real ranks, that it changes nothing but time."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from luffy.comm import build_mesh
from luffy.condensation import parse_condense
from luffy.exchange import CondenseState
from luffy.plan.choose import Mode
from luffy.plan.topology import Topology
from luffy.plan.trace import TraceStep
from luffy.recipes import get_recipe
from luffy.testing import run_ranks
from luffy.train.auto import AutoControl
from luffy.train.auto_trial import SHARE
from luffy.train.cli import main
from luffy.train.options import TrainOptions
from luffy.train.rehoming import wire_of
from luffy.train.trainer import Trainer

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


L = 4
STAY = Mode(False, ("static",) * L)
FETCH, SHADOW = (replace(STAY, residency=(kind,) * L) for kind in ("fetch", "shadow"))
MOVE, NARROW, ALIKE = replace(STAY, moves=True), replace(STAY, wire="int8"), replace(STAY, condenses=True)


class Fake(AutoControl):
    """One rank whose steps take what a test says, and whose model of costs says what the test wants.

    truth, modelled: seconds of a step by mode. kept: what condensation leaves, where it is allowed.
    """

    def __init__(
        self, truth: dict[Mode, float], modelled: dict[Mode, float], *, steps: int = 1000, every: int = 200,
        kept: float | None = None, looking: float = 0.0, scheduled: range | None = None,
    ) -> None:  # fmt: skip
        state = None if kept is None else CondenseState(parse_condense("static:0.9"), [0.9] * L)
        layers = [SimpleNamespace(recipe=None) for _ in range(L)]
        runtime = SimpleNamespace(condense=state, recipe=get_recipe("auto"))
        model = SimpleNamespace(moe_layers=layers, runtime=runtime)
        super().__init__(
            model, None, Topology.flat(2), 0.0, steps=steps, every=every, padded=False,  # type: ignore[arg-type]
            clock=lambda: self.now,
        )  # fmt: skip
        self.now, self.looking, self.scheduled = 0.0, looking, scheduled
        self.truth, self.modelled, self.true_kept = truth, modelled, kept
        self.formats = {"int8": None}  # type: ignore[dict-item]
        self.ran: list[Mode] = []
        self.seconds: list[float] = []

    def _agree(self, numbers: list[int]) -> list[int]:
        return numbers

    def _weigh(self, traced: list[TraceStep]) -> dict[Mode, float]:
        self.now += self.looking
        table = dict(self.modelled)
        if self.may_condense:
            table[ALIKE] = self._condensed(table[STAY])
        table.setdefault(self.mode, table[STAY])  # the mode at hand is always weighed
        return table

    def run(
        self, steps: int, noise: float = 0.0, traced: Callable[[int], bool] = lambda step: False, first: int = 0
    ) -> dict[int, dict[str, Any]]:
        """What was written down, by the number of steps done. A recorded step takes longer."""
        random, out = np.random.default_rng(0), {}
        for step in range(first, steps):
            if self.condense is not None:
                self.condense.on = self.scheduled is None or step in self.scheduled
            self.before(step)
            tracing = self.decides_after(step) or traced(step)
            seconds = self.truth[self.mode] * (1 + noise * random.standard_normal()) * (1.2 if tracing else 1)
            self.ran.append(self.mode)
            self.seconds.append(seconds)
            record = {
                "seconds": seconds,
                "seconds_split": {"attention": 0.0, "condense": 0.01 if self.mode.condenses else 0},
            }
            record["condense"] = {"kept": self.true_kept if self.condense is not None and self.condense.on else 1.0}
            if (choice := self.after(step, record, [], not tracing)) is not None:
                out[step + 1] = choice
        return out


def test_what_promises_nothing_is_never_tried_and_looks_grow_rare() -> None:
    truth = {STAY: 1.0, FETCH: 2.0, SHADOW: 1.0, MOVE: 1.0}
    auto = Fake(truth, {STAY: 0.5, FETCH: 1.4, SHADOW: 0.49, MOVE: 0.5}, every=100)
    written = auto.run(400)
    assert set(auto.ran) == {STAY}
    assert sorted(written) == [8, 18, 38, 78, 158, 258, 358]
    assert all(w["chosen"] == "vanilla_dedup" and w["predicted_seconds"]["janus"] > 1.8 for w in written.values())


@pytest.mark.parametrize("better", [FETCH, SHADOW, MOVE, NARROW, replace(STAY, residency=("static", "fetch") * 2)])
def test_a_better_mode_is_taken_up_by_turns_and_held(better: Mode) -> None:
    truth = {STAY: 1.0, FETCH: 1.5, SHADOW: 1.3, MOVE: 1.2, NARROW: 1.1} | {better: 0.8}
    auto = Fake(truth, {m: 0.6 * s for m, s in truth.items()})
    written = auto.run(300, noise=0.03)
    look, duel = written[8], written[24]
    assert look["chosen"] == duel["challenger"] == duel["chosen"] == better.name
    assert auto.ran[8:24] == [better] * 4 + [STAY] * 8 + [better] * 4 and set(auto.ran[24:]) == {better}
    assert duel["challenger_seconds"] == pytest.approx(0.8, rel=0.05) and duel["got_seconds"] == pytest.approx(
        1, rel=0.05
    )
    # With some noise, what was predicted of the mode that lost is what it takes.
    assert written[34]["predicted_seconds"]["vanilla_dedup"] == pytest.approx(1.0, abs=0.05)


def test_a_mode_that_was_predicted_wrongly_is_tried_once() -> None:
    truth = {STAY: 1.0, MOVE: 1.05}
    auto = Fake(truth, {STAY: 0.5, MOVE: 0.4})
    written = auto.run(600)
    assert written[24]["chosen"] == "vanilla_dedup" and not written[24]["given_up"]
    assert set(auto.ran[24:]) == {STAY}
    later = [w for step, w in written.items() if step > 24]
    assert later and all(w["predicted_seconds"]["migrate"] == pytest.approx(1.05) for w in later)


def test_a_mixture_learns_from_one_that_is_almost_the_same() -> None:
    mixed = replace(STAY, residency=("static", "fetch", "fetch", "fetch"))
    auto = Fake({STAY: 1.0, mixed: 1.2}, {STAY: 0.5, mixed: 0.3})
    auto.run(40)
    known = auto.offsets[mixed]
    assert known == pytest.approx(0.4)
    assert auto._offset(replace(mixed, residency=("static", "fetch", "fetch", "shadow"))) == known
    assert auto._offset(FETCH) == known and auto._offset(SHADOW) == 0


@pytest.mark.parametrize("slower", [1.3, 2.0, 10.0])
@pytest.mark.parametrize("steps", [30, 60, 400])
def test_trying_stays_within_its_budget(slower: float, steps: int) -> None:
    """Three modes that all promise much and are all slow; given up after one step that is measured."""
    truth = {STAY: 1.0, FETCH: slower, SHADOW: slower, MOVE: slower}
    auto = Fake(truth, {STAY: 0.9, FETCH: 0.1, SHADOW: 0.2, MOVE: 0.3}, steps=steps)
    auto.run(steps)
    tried = [m for m in auto.ran if m != STAY]
    assert len(tried) <= 2 * 3
    # At most one challenger, hopeless beyond what was reckoned with, goes over.
    assert sum(s - 1 for s, m in zip(auto.seconds, auto.ran, strict=True) if m != STAY) <= SHARE * steps + 2 * (
        slower - 1
    )
    assert bool(tried) == (steps > 30)  # too short a run tries nothing


def test_looks_that_take_long_are_made_as_rarely_as_the_budget_wants() -> None:
    auto = Fake({STAY: 0.01, MOVE: 0.01}, {STAY: 0.005, MOVE: 0.005}, steps=20000, every=100, looking=0.1)
    looks = sorted(auto.run(20000))
    assert looks[:8] == [8, 18, 38, 78, 158, 318, 638, 1278] and looks[12] - looks[11] == pytest.approx(1360, abs=3)
    assert 0.102 * len(looks) < SHARE * 0.01 * 20000
    short = Fake({STAY: 0.01}, {STAY: 0.005}, steps=700, every=100, looking=0.1)
    assert sorted(short.run(700)) == [8]  # one look has taken the budget


def test_recorded_steps_count_in_no_modes_time() -> None:
    truth = {STAY: 1.0, MOVE: 0.9}
    plain, traced = (Fake(truth, {STAY: 0.6, MOVE: 0.5}) for _ in range(2))
    plain.run(100)
    written = traced.run(100, traced=lambda step: step % 2 == 0)
    assert traced.mode == plain.mode == MOVE
    assert all(w["got_seconds"] in (1.0, 0.9) for w in written.values())
    always = Fake(truth, {STAY: 0.6, MOVE: 0.5})
    assert not always.run(100, traced=lambda step: True) and set(always.ran) == {STAY}


def test_condensation_is_tried_where_allowed_and_priced_by_what_it_kept() -> None:
    """0.6 of a second depends on rows. 0.4 of them are kept: 0.24, and 0.01 to find them: 0.65 a step, modelled."""
    good = Fake({STAY: 1.0, ALIKE: 0.65}, {STAY: 0.6}, kept=0.4)
    written = good.run(100)
    assert written[8]["kept_share"] is None and written[8]["chosen"] == "vanilla_dedup+condensed"
    assert good.mode == ALIKE and good.condense is not None and good.condense.on
    assert good.offsets[ALIKE] == pytest.approx(0.0)
    assert written[34]["kept_share"] == 0.4
    bad = Fake({STAY: 1.0, ALIKE: 1.1}, {STAY: 0.6}, kept=0.4)
    bad.run(300)
    assert set(bad.ran[24:]) == {STAY} and bad.condense is not None and not bad.condense.on
    assert bad.offsets[ALIKE] == pytest.approx(0.45)
    without = Fake({STAY: 1.0}, {STAY: 0.6})
    without.run(100)
    assert set(without.ran) == {STAY}


def test_condensation_keeps_to_its_part_of_the_run() -> None:
    auto = Fake({STAY: 1.0, ALIKE: 0.5}, {STAY: 0.6}, kept=0.1, scheduled=range(30, 200))
    auto.run(300)
    ran = [step for step, m in enumerate(auto.ran) if m == ALIKE]
    assert 30 <= ran[0] < 100 and ran[-1] == 199
    # A duel is ended where the part does.
    auto = Fake({STAY: 1.0, ALIKE: 0.5}, {STAY: 0.6}, kept=0.1, scheduled=range(10))
    auto.run(300)
    assert [step for step, m in enumerate(auto.ran) if m == ALIKE] == [8, 9] and auto.duel is None


def test_a_rank_follows_rank_0_into_a_mixture_that_it_would_not_have_weighed() -> None:
    """Ranks of another EP group recorded other routing."""
    foreign = replace(STAY, residency=("fetch", "static", "static", "shadow"))

    class Led(Fake):
        def _agree(self, numbers: list[int]) -> list[int]:
            if len(numbers) == 1:
                return [2 * (not self.duel.turns)] if self.duel else numbers  # go on, then take the challenger
            return [*self._encode(foreign), numbers[-1]] if self.mode == STAY else numbers

    led = Led({STAY: 1.0, foreign: 2.0}, {STAY: 0.6, MOVE: 0.6})
    led.run(60)
    assert led.mode == foreign and foreign in led.offsets and led.ran[8:24].count(foreign) == 8


def test_what_was_learnt_goes_through_a_checkpoint() -> None:
    truth = {STAY: 1.0, FETCH: 0.8, MOVE: 1.1}
    modelled = {STAY: 0.6, FETCH: 0.4, MOVE: 0.39}
    auto = Fake(truth, modelled)
    auto.run(60)
    assert auto.mode == FETCH
    saved = json.loads(json.dumps(auto.to_dict()))
    again = Fake(truth, modelled)
    again.restore(saved)
    assert again.to_dict() == auto.to_dict()
    assert again.model.moe_layers[0].recipe.residency == "fetch"
    again.run(300, first=60)
    assert set(again.ran) == {FETCH}
    # In a duel the holder is what goes on.
    fighting = Fake(truth, modelled)
    fighting.run(12)
    assert fighting.mode != STAY and Mode.from_dict(fighting.to_dict()["mode"]) == STAY
    # A wire format that is no longer allowed is left.
    narrow = Fake({STAY: 1.0, NARROW: 0.5}, {STAY: 0.6, NARROW: 0.1})
    narrow.run(60)
    other = Fake(truth, modelled)
    other.formats = {}
    other.restore(narrow.to_dict())
    assert narrow.mode == NARROW and other.mode == STAY


def _two_minds(rank: int, out: str) -> tuple[list[str], list[int], str]:
    """Ranks that measure different times: what rank 0 finds fast rank 1 finds hopeless, and would never try."""
    options = TrainOptions(
        recipe="auto", layers=2, hidden_size=32, heads=4, expert_hidden_size=32, dense_hidden_size=32, vocab_size=512,
        sequence_length=32, batch_size=4, steps=200, device="cpu", profile_attention=False, out=out, tensorboard=False,
    )  # fmt: skip
    trainer = Trainer(options, build_mesh(torch.device("cpu"), None))
    trainer.prepare()
    auto = trainer.auto
    assert auto is not None
    auto.topology = Topology.flat(2, 1e12 if rank else 1e3)
    # Re-homing plans for the layers as they run now.
    for mode in (replace(auto.mode, moves=True), replace(auto.mode, residency=("fetch", "shadow")), auto.mode):
        auto.set(mode)
        wire = wire_of(trainer.model, padded=False)
        assert wire.strategy == ("best" if mode.moves else "stay") and wire.residency == mode.residency
    names, looks = [], []
    after = auto.after

    def stretched(step: int, record: dict[str, Any], traced: list[TraceStep], plain: bool) -> dict[str, Any] | None:
        plainly = auto.mode == Mode(False, ("static",) * 2)
        record["seconds"] = 0.5 if plainly == bool(rank) else 1.0
        return after(step, record, traced, plain)

    auto.after = stretched  # type: ignore[method-assign]
    for _ in range(40):
        record = trainer.train_step()
        names.append(record["mode"])
        if "auto" in record:
            looks.append(record["step"])
    return names, looks, auto.mode.name


def test_ranks_that_measure_different_times_go_together(tmp_path: Path) -> None:
    first, second = run_ranks(_two_minds, 2, str(tmp_path / "run"))
    assert first == second
    names, looks, held = first
    assert looks[:2] == [8, 24] and names[8:12] == [held] * 4 and held != "vanilla_dedup"


def test_auto_changes_nothing_but_time(data: str, tmp_path: Path) -> None:
    common = ["--data", data, "--cache-dir", str(tmp_path / "cache")]
    plain = train(tmp_path / "plain", "--recipe", "vanilla_dedup", "--steps", "60", *common)
    out = tmp_path / "auto"
    before = train(out, "--recipe", "auto", "--steps", "60", "--checkpoint-every", "37", *common)
    shutil.rmtree(out / "checkpoints" / "step-00000060")
    records = train(out, "--recipe", "auto", "--steps", "60", "--resume", *common)
    assert records[:37] == before[:37]
    choices = {r["step"]: r["auto"] for r in records if "auto" in r}
    assert 8 in choices and {"vanilla_dedup", "janus", "fastermoe", "migrate"} <= set(choices[8]["predicted_seconds"])
    assert [r["mode"] for r in records[:8]] == ["vanilla_dedup"] * 8
    assert records[37]["mode"] in ("vanilla_dedup", *(c["chosen"] for s, c in choices.items() if s <= 37))
    for a, b in zip(plain, records, strict=True):
        assert a["loss"] == pytest.approx(b["loss"], rel=1e-9)


def test_what_the_user_allows_is_weighed_and_moves_nothing(data: str, tmp_path: Path) -> None:
    records = train(tmp_path / "auto", "--recipe", "auto", "--wire", "int8", "--condense", "static:0.5,correct",
                    "--steps", "60", "--data", data, "--cache-dir", str(tmp_path / "cache"))  # fmt: skip
    look = records[7]["auto"]
    names = set(look["predicted_seconds"])
    assert {"vanilla_dedup+int8", "vanilla_dedup+condensed", "vanilla_dedup+int8+condensed"} <= names
    assert not any("migrate" in n and ("int8" in n or "condensed" in n) for n in names)
    assert not any("janus" in n and "condensed" in n for n in names)
    plain = records[6]["bytes"]["dispatch"]
    for record in records:  # float64 rows of 32: as int8 a byte each and a scale
        if record["mode"] == "vanilla_dedup+int8":
            assert 0 < record["bytes"]["dispatch"] < 0.4 * plain
        assert (record["condense"]["kept"] < 1) == ("condensed" in record["mode"])


def test_auto_refuses_what_it_cannot_weigh(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(["train", "--recipe", "auto", "--residency", "fetch"])
    assert stopped.value.code == 2
    assert "leave out --residency" in capsys.readouterr().err
