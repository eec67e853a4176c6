"""`luffy plan` as a user meets it: a trace, a cluster, a table, a picture, and clear refusals."""

import json

import numpy as np
import pytest

from luffy.plan.trace import RoutingTrace, TraceStep
from luffy.train.cli import main

E, K, LAYERS = 16, 2, 2


def save_trace(path, steps=8, sequences=16, seed=0):
    rng = np.random.default_rng(seed)
    made = []
    for n in range(steps):
        lengths = np.full(sequences, 8)
        chosen = np.argsort(rng.random((LAYERS, 8 * sequences, E)), axis=2)[:, :, :K]
        made.append(TraceStep(n + 1, lengths, np.zeros(sequences, dtype=np.int64), chosen, chosen[1:]))
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
    assert total["luffy"] < total["vanilla_dedup"] < total["vanilla"]
    # Rows of 32 values: 64 bytes as they are, 18 as int4 to the experts, 34 as int8 back; gradients alike.
    assert total["luffy_max"] == pytest.approx(total["vanilla_dedup"] * (18 + 34) / 128)
    assert found["luffy"]["rehomed"] and not found["netmoe"]["rehomed"]


def test_a_wire_format_shrinks_what_is_counted_and_what_moves(tmp_path, capsys):
    run = save_trace(tmp_path / "run")
    predictions = []
    for wire in ("model", "int8,residual=int16", "aggressive"):
        target = tmp_path / "plan.json"
        main(["plan", "--trace", str(run), "--topology", "8:intra=1gbit", "--recipes", "vanilla_dedup,netmoe,luffy",
              "--wire", wire, "--json", str(target)])  # fmt: skip
        predictions.append({p["recipe"]: p for p in json.loads(target.read_text())["predictions"]})
    capsys.readouterr()
    plain, fine, coarse = predictions
    total = [sum(p["vanilla_dedup"]["dispatch"][1:]) for p in predictions]
    assert total[1] == total[0] * 34 / 64 and total[2] == total[0] * 18 / 64
    for p in (fine, coarse):  # moving costs a residual of 66 or 64 bytes a token, against rows of 34
        assert p["luffy"]["moved_share"] < 0.5 * plain["luffy"]["moved_share"]
        assert sum(p["luffy"]["combine"]) + sum(p["luffy"]["dispatch"]) > 0
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
