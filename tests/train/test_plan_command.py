"""`luffy plan` as a user meets it: a trace, a cluster, a table, a picture, and clear refusals."""

import json
from dataclasses import replace

import numpy as np
import pytest

from luffy.plan.trace import RoutingTrace, TraceStep
from luffy.report.plan_figure import build_figure as figure
from luffy.seats.features import DIM
from luffy.train.cli import main

E, K, LAYERS = 16, 2, 2


def save_trace(path, steps=8, sequences=64, seed=0, features=True):
    """Sequences of eight kinds, told by their features, that like two experts each, others in each layer."""
    rng = np.random.default_rng(seed)
    made = []
    for n in range(steps):
        lengths, kind = np.full(sequences, 8), rng.integers(0, 8, sequences)
        chosen = np.argsort(rng.random((LAYERS, 8 * sequences, E)), axis=2)[:, :, :K]
        loyal = rng.random((LAYERS, 8 * sequences)) < 0.6
        for layer in range(LAYERS):
            liked = (2 * np.repeat(kind, 8) + 5 * layer)[:, None] % E + np.arange(2)
            chosen[layer] = np.where(loyal[layer][:, None], liked % E, chosen[layer])
        told = 1000 * np.eye(8, DIM, dtype=np.int16)[kind] if features else None
        made.append(TraceStep(n + 1, lengths, np.zeros(sequences, dtype=np.int64), chosen, chosen[1:], told))
    owners = np.zeros((LAYERS, E), dtype=np.int64)
    for step in made:
        name = path / "trace" / f"step-{step.step:08d}.npz"
        RoutingTrace((step,), E, K, 32, 64, owners, {"model": "m", "expert_num_bytes": 4096}).save(name)
    return path


def fails(capsys, *arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["plan", *map(str, arguments)])
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    return error


def test_traces_of_different_models_are_not_joined(tmp_path, capsys):
    folder = save_trace(tmp_path / "run") / "trace"
    other = RoutingTrace.load(next(folder.glob("*.npz")))
    replace(other, owners=np.zeros((LAYERS, 2 * E), dtype=np.int64), num_experts=2 * E).save(folder / "z.npz")
    assert "--trace" in (line := fails(capsys, "--trace", folder, "--topology", "1x2:intra=1gbit"))
    assert "different models" in line and "folder of one run" in line


def test_all_recipes_in_a_table_a_file_and_a_picture(tmp_path, capsys):
    run = save_trace(tmp_path / "run")
    target, picture = tmp_path / "plan.json", tmp_path / "plan.png"
    main(["plan", "--trace", str(run), "--topology", "2x4:intra=64gbit,inter=8gbit", "--compute-seconds", "0.001",
          "--json", str(target), "--figure", str(picture)])  # fmt: skip
    text = capsys.readouterr().out
    found = {p["recipe"]: p for p in json.loads(target.read_text())["predictions"]}
    assert picture.read_bytes()[:4] == b"\x89PNG"
    for recipe, p in found.items():
        assert recipe in text
        assert p["exchange_seconds"] > 0 and p["num_steps"] == 2
    total = {r: sum(p["dispatch"][1:]) + sum(p["combine"][1:]) for r, p in found.items()}
    assert total["luffy"] < 0.7 * total["vanilla_dedup"] < total["vanilla"]
    assert found["luffy"]["busiest_rows"] < 0.8 * found["vanilla_dedup"]["busiest_rows"]
    assert found["luffy"]["seated_share"] > 0.2 and found["luffy"]["moved_share"] == 0
    assert found["netmoe"]["moved_share"] > 0 and found["netmoe"]["seated_share"] == 0
    # Rows of 32 values: 64 bytes as they are, 18 as int4.
    assert total["luffy_max"] == pytest.approx(total["luffy"] * 18 / 64)
    assert found["luffy"]["rehomed"] and not found["netmoe"]["rehomed"]


def test_it_begins_with_advice_and_draws_what_matters(tmp_path, capsys, monkeypatch):
    drawn = []
    monkeypatch.setattr(
        "luffy.train.plan.build_figure", lambda found, spec: drawn.append(figure(found, spec)) or drawn[0]
    )
    run = save_trace(tmp_path / "run")
    # 10,000 ranks: groups are alike, so one is replayed.
    main(["plan", "--trace", str(run), "--topology", "1250x8:intra=64gbit,inter=1gbit", "--compute-seconds", "0.0001",
          "--json", str(tmp_path / "plan.json"), "--figure", str(tmp_path / "plan.png")])  # fmt: skip
    text, found = capsys.readouterr().out, json.loads((tmp_path / "plan.json").read_text())
    assert "one of 625 groups" in text and "summed between the 625 groups" in text
    first = text.splitlines()[0]
    assert first.startswith("advice (predicted): take luffy: ") and "if rows may be rounded, luffy_max" in first
    assert "slowest of the 625 groups" in text and found["slowest_group_seconds"]["luffy"] > 0
    assert "weights sharded (ZeRO-3)" in text and "tokens a step" in text and "…" not in text
    assert found["advice"]["recipe"] == "luffy" and found["advice"]["gain"] > 1.1
    assert [a["idle_share"] for a in found["alternatives"]] == [1 / 16, 0.0, 0.0]
    names = [label.get_text() for label in drawn[0].axes[0].get_yticklabels()]
    assert len(names) <= 6 and {"vanilla", "vanilla_dedup", "luffy", "luffy_max"} <= set(names)
    total = {p["recipe"]: sum(p["dispatch"][1:]) + sum(p["combine"][1:]) + sum(p["experts"][1:])
             for p in found["predictions"]}  # fmt: skip
    assert max(total[name] for name in names) <= 1.5 * total["vanilla"] < total["janus"]
    assert "janus" not in names and "janus: " in drawn[0].axes[0].get_xlabel()


def test_seats_need_a_trace_with_features_and_steps_to_learn_from(tmp_path, capsys):
    spec = ("--topology", "8:intra=1gbit", "--recipes", "vanilla_dedup,luffy")
    main(["plan", "--trace", str(save_trace(tmp_path / "old", features=False)), *spec])
    assert "the trace holds no features" in capsys.readouterr().out
    main(["plan", "--trace", str(save_trace(tmp_path / "short", steps=1)), *spec])
    assert "a trace of at least 2 steps" in capsys.readouterr().out


def test_a_wire_format_shrinks_what_is_counted(tmp_path, capsys):
    run = save_trace(tmp_path / "run")
    predictions = []
    for wire in ("model", "int8", "aggressive"):
        target = tmp_path / "plan.json"
        main(["plan", "--trace", str(run), "--topology", "8:intra=1gbit", "--recipes", "vanilla_dedup,netmoe,luffy",
              "--wire", wire, "--json", str(target)])  # fmt: skip
        predictions.append({p["recipe"]: p for p in json.loads(target.read_text())["predictions"]})
    capsys.readouterr()
    total = [sum(p["vanilla_dedup"]["dispatch"][1:]) for p in predictions]
    assert total[1] == total[0] * 34 / 64 and total[2] == total[0] * 18 / 64
    assert sum(predictions[1]["luffy"]["combine"][1:]) == sum(predictions[0]["luffy"]["combine"][1:]) * 34 / 64
    assert predictions[0]["netmoe"] == predictions[2]["netmoe"]  # its rows carry residuals, and stay as they are
    assert "--wire int5" in fails(capsys, "--trace", run, "--topology", "8:intra=1gbit", "--wire", "int5")


def test_one_file_is_a_trace_too_and_says_that_experts_stay(tmp_path, capsys):
    run = save_trace(tmp_path / "run")
    main(["plan", "--trace", str(run / "trace" / "step-00000003.npz"), "--topology", "8:intra=1gbit"])
    text = capsys.readouterr().out
    assert "steps 3-3" in text and "needs a trace of at least 4 steps" in text


def test_groups_on_a_large_cluster_are_like_the_group_alone(tmp_path, capsys):
    run = save_trace(tmp_path / "run")
    found = []
    for spec in ("64x16:intra=64gbit,inter=8gbit", "16:intra=64gbit"):
        target = tmp_path / "plan.json"
        main(["plan", "--trace", str(run), "--topology", spec, "--json", str(target)])
        text = capsys.readouterr().out
        assert ("one of 64 groups" in text) == spec.startswith("64x")
        found.append(json.loads(target.read_text()))
    assert found[0]["ep_size"] == found[1]["ep_size"] == 16
    assert found[0]["predictions"] == found[1]["predictions"]


def test_what_cannot_be_planned_is_refused_by_the_option(tmp_path, capsys):
    run = save_trace(tmp_path / "run", steps=1, sequences=4)
    trace = ("--trace", run)
    assert "--topology" in fails(capsys, *trace, "--topology", "3:intra=1gbit")
    assert "--ep-size" in fails(capsys, *trace, "--topology", "4x4:intra=1gbit,inter=1gbit", "--ep-size", "3")
    assert "--ep-size" in fails(capsys, *trace, "--topology", "2x6:intra=1gbit,inter=1gbit", "--ep-size", "4")
    assert "--batch-size 8" in fails(capsys, *trace, "--topology", "8:intra=1gbit")
    assert "--compute-seconds" in fails(capsys, *trace, "--topology", "2:intra=1gbit", "--compute-seconds", "-1")
    assert "--recipe" in fails(capsys, *trace, "--topology", "2:intra=1gbit", "--recipes", "nothing")
    assert "--recipes" in fails(capsys, *trace, "--topology", "2:intra=1gbit", "--recipes", ",")
    assert "no such file" in fails(capsys, "--trace", tmp_path / "none", "--topology", "2:intra=1gbit")
    (tmp_path / "empty").mkdir()
    assert "--trace-every" in fails(capsys, "--trace", tmp_path / "empty", "--topology", "2:intra=1gbit")
    broken = tmp_path / "broken.npz"
    broken.write_bytes(b"PK\x03\x04 cut off")
    assert "damaged" in fails(capsys, "--trace", broken, "--topology", "2:intra=1gbit")
