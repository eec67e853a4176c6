"""Several recipes side by side: one table, one page, ratios that agree with the runs."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from luffy.errors import UserError
from luffy.train.cli import main
from luffy.train.entries import parse_entries


class _Page(HTMLParser):
    def __init__(self):
        super().__init__()
        self.images, self.cells = 0, []

    def handle_starttag(self, tag, attrs):
        if tag == "img":
            self.images += 1
            assert dict(attrs)["src"].startswith("data:")

    def handle_data(self, data):
        self.cells.append(data)


@pytest.mark.slow
def test_compare_runs_each_recipe_and_reports_their_ratios(small, as_arguments, capfd):
    settings = small(ranks=2, steps=3, checkpoint_every=0, resume=True)
    names = ["vanilla", "vanilla_dedup", "netmoe"]
    main(["compare", "--recipes", ",".join(names), *as_arguments(settings)])
    printed = capfd.readouterr().out
    out = Path(settings["out"])
    rows = json.loads((out / "compare.json").read_text())
    assert [r["recipe"] for r in rows] == names
    for mine in rows:
        for other in rows:
            if other is not mine:
                ratio = other["step_seconds"][1] / mine["step_seconds"][1]
                assert mine["speedup_over"][other["recipe"]] == pytest.approx(ratio)
    # Lossless: the same losses, fewer bytes.
    assert rows[0]["final_loss"] == pytest.approx(rows[2]["final_loss"], rel=1e-10)
    assert rows[1]["step_bytes"]["dispatch"] <= rows[0]["step_bytes"]["dispatch"]
    assert rows[2]["plan"]["moved_share"] > 0
    assert all(name in printed for name in names)
    page = _Page()
    page.feed((out / "report.html").read_text())
    assert page.images == 5  # losses by time and bytes, phases, directions, matrices
    assert all(name in page.cells for name in names)
    # What is finished is not run again.
    before = (out / "netmoe" / "metrics.jsonl").stat().st_mtime_ns
    main(["compare", "--recipes", ",".join(names), *as_arguments(settings)])
    assert (out / "netmoe" / "metrics.jsonl").stat().st_mtime_ns == before


@pytest.mark.slow  # seven runs and as many pages of pictures
def test_repeats_take_turns_and_recipes_have_options_of_their_own(small, as_arguments, tmp_path, capfd):
    other = small(ranks=2, steps=2, recipe="vanilla", out=str(tmp_path / "other"), checkpoint_every=0)
    main(["train", *as_arguments(other)])
    summary = tmp_path / "other" / "summary.json"
    summary.write_text(json.dumps(json.loads(summary.read_text()) | {"differs": {"router": "another one"}}))
    settings = small(ranks=2, steps=4, checkpoint_every=0, eval_every=1, resume=True)
    recipes = "vanilla_dedup;local=luffy --locality-loss 0.5 --rehome-every 0"
    command = ["compare", "--recipes", recipes, "--repeats", "2", "--vary-seed", "--discard-checkpoints"]
    command += ["--also", other["out"]]
    arguments = [*command, *as_arguments(settings)]
    main(arguments)
    printed = capfd.readouterr()
    out = Path(settings["out"])
    order = ["vanilla_dedup", "local", "vanilla_dedup.2", "local.2"]
    ends = [(out / name / "summary.json").stat().st_mtime_ns for name in order]
    assert ends == sorted(ends)  # A B A B
    base, local, elsewhere = json.loads((out / "compare.json").read_text())
    assert [s["label"] for s in (base, local, elsewhere)] == ["vanilla_dedup", "local", "vanilla"]
    assert [r["seed"] for r in base["repeats"]] == [0, 1] and len(elsewhere["repeats"]) == 1
    assert base["repeats"][0]["valid_loss"] != base["repeats"][1]["valid_loss"]
    options = [json.loads((out / name / "config.json").read_text())["options"] for name in order]
    assert [o["locality_loss"] for o in options] == [None, 0.5, None, 0.5]
    assert [o["recipe"] for o in options] == ["vanilla_dedup", "luffy"] * 2
    assert elsewhere["elsewhere"] and elsewhere["differs"] == ["router: another one"]
    assert "vanilla*: made elsewhere; router: another one" in printed.out
    assert not (out / "local" / "checkpoints").exists()
    # Of all that was measured, the matrix is what the meter counted by direction.
    rows = ("dispatch", "combine", "dispatch_backward", "combine_backward", "experts")
    assert sum(map(sum, base["traffic"]["bytes"])) == sum(base["bytes"][kind] for kind in rows)
    # A run that is stopped, or gone, is run again; what is finished is not.
    kept = (out / "local" / "metrics.jsonl").stat().st_mtime_ns
    (out / "local.2" / "summary.json").unlink()
    main(arguments)
    assert "local.2 (1 of 1)" in capfd.readouterr().err
    assert (out / "local" / "metrics.jsonl").stat().st_mtime_ns == kept
    # With other options it would be another comparison.
    for changed, said in (({"lr": 0.5}, "--lr 0.001"), ({"steps": 5}, "--steps 4")):
        with pytest.raises(SystemExit) as caught:
            main([*command, *as_arguments(settings | changed)])
        assert caught.value.code == 2
        words = capfd.readouterr().err
        assert "--resume" in words and said in words


def test_recipes_are_read_with_names_and_options():
    found = parse_entries(
        "vanilla,netmoe; fast = vanilla_dedup --wire dispatch=int4,combine=int8;luffy --no-tensorboard"
    )
    assert [(e.label, e.recipe) for e in found] == [
        ("vanilla", "vanilla"),
        ("netmoe", "netmoe"),
        ("fast", "vanilla_dedup"),
        ("luffy --no-tensorboard", "luffy"),
    ]
    assert [e.options for e in found] == [{}, {}, {"wire": "dispatch=int4,combine=int8"}, {"tensorboard": False}]
    assert len({e.folder for e in found}) == 4
    assert all(set(e.folder) <= set("abcdefghijklmnopqrstuvwxyz0123456789_.+-") for e in found)
    assert [e.options for e in parse_entries("vanilla,luffy --locality-loss 0.1")] == [{}, {"locality_loss": 0.1}]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("vanilla;luffy --lokality 1", "No such option"),
        ("vanilla;luffy --locality-loss much", "not a valid float"),
        ("vanilla;luffy --seed 3", "--seed holds for all recipes alike"),
        ("vanilla;--wire int8", "'--wire int8'"),
        ("vanilla;luffy --wire 'int8", "No closing quotation"),
        ("luffy --lr 1;luffy --lr 1", "there twice"),
    ],
)
def test_what_cannot_be_read_is_named(text, says):
    with pytest.raises(UserError, match="--recipes") as caught:
        parse_entries(text)
    assert says in str(caught.value)


def test_compare_refuses_what_cannot_be_compared(small, as_arguments, capfd):
    for names in ("luffy", "luffy,luffy", "luffy,magic"):
        with pytest.raises(SystemExit) as caught:
            main(["compare", "--recipes", names, *as_arguments(small())])
        assert caught.value.code == 2
        assert "--recipe" in capfd.readouterr().err
