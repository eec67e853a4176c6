"""Several recipes side by side: one table, one page, ratios that agree with the runs."""

import json
from html.parser import HTMLParser
from pathlib import Path

import pytest

from luffy.train.cli import main


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


def test_compare_runs_each_recipe_and_reports_their_ratios(small, as_arguments, capfd):
    settings = small(ranks=2, steps=3, checkpoint_every=0, resume=True)
    names = ["vanilla", "vanilla_dedup", "luffy"]
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
    assert page.images == 4
    assert all(name in page.cells for name in names)
    # What is finished is not run again.
    before = (out / "luffy" / "metrics.jsonl").stat().st_mtime_ns
    main(["compare", "--recipes", ",".join(names), *as_arguments(settings)])
    assert (out / "luffy" / "metrics.jsonl").stat().st_mtime_ns == before


def test_compare_refuses_what_cannot_be_compared(small, as_arguments, capfd):
    for names in ("luffy", "luffy,luffy", "luffy,magic"):
        with pytest.raises(SystemExit) as caught:
            main(["compare", "--recipes", names, *as_arguments(small())])
        assert caught.value.code == 2
        assert "--recipe" in capfd.readouterr().err
