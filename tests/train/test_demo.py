"""`luffy demo`: four recipes on one small model, a page with a verdict, and one last line; without root too."""

import json
import os

import pytest

from luffy.lab.namespace import missing_capabilities
from luffy.report.verdict import sentence, verdicts
from luffy.train import demo
from luffy.train.cli import main
from luffy.train.demo import RECIPES, last_line


def summary(label, num_bytes, seconds, loss):
    return {"label": label, "step_bytes": {"dispatch": num_bytes}, "step_seconds": [seconds] * 3, "valid_loss": loss,
            "folders": []}  # fmt: skip


FOUND = [
    summary("vanilla", 600, 3.0, 2.0),
    summary("luffy", 400, 3.1, 2.004),
    summary("luffy_paper", 700, 6.0, 2.3),
    summary("luffy_max", 100, 1.5, 1.98),
]


def test_a_verdict_says_bytes_speed_and_loss():
    assert dict(verdicts(FOUND)) == {
        "luffy": "1.50x fewer bytes than vanilla, as fast, same loss",
        "luffy_paper": "1.17x more bytes than vanilla, 2.0x slower, loss +0.300 nats",
        "luffy_max": "6.0x fewer bytes than vanilla, 2.0x faster, loss -0.020 nats",
    }
    assert sentence(summary("a", 600, 1.0, None), FOUND[0]) == (
        "as many bytes as vanilla, 3.0x faster, loss not measured"
    )
    assert sentence(summary("a", 0, 3.0, 2.0), FOUND[0]).startswith("bytes not counted")


def test_the_last_line_names_everything(tmp_path):
    (tmp_path / "compare.json").write_text(json.dumps(FOUND))
    assert last_line(tmp_path, "50mbit", 118.6) == (
        "luffy: 1.50x fewer bytes than vanilla, as fast, same loss; "
        "luffy_max: 6.0x fewer bytes than vanilla, 2.0x faster, loss -0.020 nats "
        f"(4 ranks behind emulated links of 50mbit; {tmp_path}/report.html; 119 s since the start)"
    )
    without = last_line(tmp_path, None, 5)
    assert "as fast" not in without and "speed not compared: emulated links need root" in without


def test_without_links_the_demo_goes_on_and_a_failed_run_ends_it(tmp_path, monkeypatch, capsys):
    called = []

    def luffy(status, writes=False):
        def run(arguments):
            called.append(arguments[0])
            if writes:
                (tmp_path / "vanilla").mkdir()
                (tmp_path / "vanilla" / "metrics.jsonl").write_text("{}")
            return status

        return run

    missing = "luffy.lab.namespace.missing_capabilities"
    monkeypatch.setattr(missing, lambda: ["CAP_NET_ADMIN"])
    monkeypatch.setattr(demo, "_luffy", luffy(0))
    assert not demo._in_lab(["compare"], "50mbit", tmp_path) and called == []  # no root
    monkeypatch.setattr(missing, list)
    monkeypatch.setattr(demo, "_luffy", luffy(2))
    assert not demo._in_lab(["compare"], "50mbit", tmp_path) and called == ["lab"]  # root, and a kernel without links
    assert "no emulated links on this machine" in capsys.readouterr().err
    monkeypatch.setattr(demo, "_luffy", luffy(1, writes=True))
    with pytest.raises(SystemExit, match="1"):  # the comparison had begun: that is no matter of links
        demo._in_lab(["compare"], "50mbit", tmp_path)


def test_mistakes_are_one_line(tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(["demo", "--out", str(tmp_path / "in" / "demo"), "--data", str(tmp_path)])
    assert stopped.value.code == 2 and "--out" in capsys.readouterr().err


@pytest.mark.slow
def test_the_demo_runs_with_links_or_without(corpus, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("XDG_CACHE_HOME", corpus["cache_dir"])
    behind = os.geteuid() == 0 and not missing_capabilities()
    link, out = "200mbit" if behind else "none", tmp_path / "demo"
    main(["demo", "--data", corpus["data"], "--out", str(out), "--start-steps", "2", "--steps", "3", "--link", link])
    last = capfd.readouterr().out.strip().splitlines()[-1]
    assert last.startswith("luffy: ") and "luffy_max: " in last and " than vanilla" in last and "loss" in last
    assert ("behind emulated links" in last) is behind
    assert [s["label"] for s in json.loads((out / "compare.json").read_text())] == list(RECIPES)
    page = (out / "report.html").read_text()
    assert page.index('class="verdict"') < page.index("<table") and "fewer bytes than vanilla" in page
