"""A report is one well-formed page that asks nothing of the network, whatever the run did not record."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from luffy.errors import UserError
from luffy.report.breakdown import time_split_figure
from luffy.report.figures import condensation_figure, draw_pictures
from luffy.report.html import write_run_report
from luffy.report.runs import read_run, totals, write_json_atomic
from luffy.report.series import bin_means, expert_load, smooth

from .synthetic import Page, make_run


def check_page(path: Path) -> tuple[str, Page]:
    text = path.read_text("utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and '<meta name="viewport" content="width=device-width' in text
    assert {"html", "head", "title", "body", "h1", "main"} <= set(page.tags)
    assert all(resource.startswith("data:image/svg+xml;base64,") for resource in page.resources)
    assert not re.search(r"@import|url\(\s*['\"]?http|<script|<link", text)
    assert page.images and all(image["alt"] for image in page.images)
    return text, page


def check_png(path: Path) -> None:
    from PIL import Image

    with Image.open(path) as image:
        assert image.format == "PNG" and image.width > 600 and image.height > 300
        colours = image.convert("RGB").getcolors(maxcolors=2**24)
        assert colours is not None and len(colours) > 20, "the picture is empty"


def test_a_full_run(tmp_path: Path) -> None:
    out = make_run(tmp_path / "run", 60)
    path = write_run_report(out)
    assert path == out / "report.html"
    text, page = check_page(path)
    names = {"loss", "loss_by_time", "bytes", "links", "time_split", "speed", "expert_load"}
    assert {p.stem for p in out.glob("*.png")} == names and len(page.images) == len(names)
    for name in names:
        check_png(out / f"{name}.png")
    for fact in ("luffy · moe-gpt2-tiny", "measured", "4 ranks, Some CPU, 2 cores, torch 2.13", "options.lr", "0.001"):
        assert fact in text, fact
    assert "&lt;script&gt;" in text  # options are text, whatever they hold
    assert path.stat().st_size < 2_000_000


def test_the_stages_of_a_step_add_up_to_it(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path / "run", 20))
    whole = float(np.mean([r["seconds"] for r in run.records[3:]]))
    figure = time_split_figure(run, {"attention": 0.25 * whole, "exchange": 0.5 * whole})
    widths = [bar.get_width() for bar in figure.axes[0].patches]
    assert widths == pytest.approx([0.25 * whole, 0.5 * whole, 0.25 * whole])


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_a_run_that_recorded_only_what_it_must(tmp_path: Path, steps: int) -> None:
    out = make_run(tmp_path / "bare", steps, full=False)
    text, _ = check_page(write_run_report(out))
    check_png(out / "loss.png")
    assert not (out / "expert_load.png").exists() and not (out / "time_split.png").exists()
    assert "not measured" in text and "Time by stage" not in text


@pytest.mark.slow
def test_one_step_with_everything(tmp_path: Path) -> None:
    check_page(write_run_report(make_run(tmp_path / "one", 1)))


def test_a_diverged_run_still_has_a_report(tmp_path: Path) -> None:
    out = make_run(tmp_path / "nan", 3, full=False)
    records = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    (out / "metrics.jsonl").write_text("".join(json.dumps(r | {"loss": None}) + "\n" for r in records))
    check_page(write_run_report(out))


@pytest.mark.slow
def test_a_long_run_does_not_make_a_long_file(tmp_path: Path) -> None:
    out = make_run(tmp_path / "long", 6000, full=False)
    assert write_run_report(out).stat().st_size < 1_000_000


@pytest.mark.parametrize("word", ["emulated", "predicted"])
def test_the_origin_of_the_numbers_is_said(tmp_path: Path, word: str) -> None:
    out = make_run(tmp_path / "run", 2)
    summary = json.loads((out / "summary.json").read_text())
    write_json_atomic(out / "summary.json", summary | {"provenance": word, "network": "links of 4 Gb/s"})
    text, _ = check_page(write_run_report(out))
    assert f'<span class="badge {word}">{word}</span>' in text and "links of 4 Gb/s" in text


def test_a_folder_without_a_run_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--out"):
        write_run_report(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(UserError, match="no step"):
        write_run_report(tmp_path)
    make_run(tmp_path, 1)
    (tmp_path / "summary.json").write_text("{")
    with pytest.raises(UserError, match=r"summary\.json is not JSON"):
        write_run_report(tmp_path)


@pytest.mark.slow
def test_drawing_is_repeatable_and_leaves_matplotlib_as_it_was(tmp_path: Path) -> None:
    import matplotlib as mpl

    before = dict(mpl.rcParams)
    run = read_run(make_run(tmp_path, 5))
    first, second = draw_pictures(run), draw_pictures(run)
    assert [p.svg for p in first] == [p.svg for p in second]
    assert dict(mpl.rcParams) == before


def test_smoothing_follows_a_line_and_skips_gaps() -> None:
    line = np.arange(200.0)
    assert smooth(line, 3.0)[20:-20] == pytest.approx(line[20:-20])
    gap = np.full(50, 2.0)
    gap[10:15] = np.nan
    assert smooth(gap, 2.0) == pytest.approx(np.full(50, 2.0))
    assert len(smooth(np.arange(4.0), 50.0)) == 4


def test_bins_keep_the_mean_and_the_ends() -> None:
    values = np.arange(1000.0)
    bins = bin_means(values, 10)
    assert bins == pytest.approx(np.arange(10) * 100 + 49.5)
    values[:100] = np.nan
    assert np.isnan(bin_means(values, 10)[0])


def test_expert_load_is_relative_to_its_layer(tmp_path: Path) -> None:
    run = read_run(make_run(tmp_path, 1))
    run.records[0]["expert_load"] = [[1, 3], [2, 2, 2, 0]]  # layers may differ in their number of experts
    load = expert_load(run)
    assert load is not None
    np.testing.assert_allclose(load, [[0.5, 1.5, np.nan, np.nan], [4 / 3, 4 / 3, 4 / 3, 0.0]])
    run.records[0]["expert_load"] = [[0, 0]]
    assert expert_load(run) is None


@pytest.mark.slow
def test_condensation_is_drawn_by_layer_and_summed_up(tmp_path: Path) -> None:
    records = [json.loads(line) for line in (make_run(tmp_path / "a", 30) / "metrics.jsonl").read_text().splitlines()]
    for r in records[5:]:
        r["condense"] = {"kept": 0.5, "layer_00": {"kept": 0.7, "threshold": 0.9}, "layer_01": {"kept": 0.3}}
    for r in records[:5]:
        r["condense"] = {"kept": 1.0}
    (tmp_path / "a" / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    assert totals(records)["copies_kept"] == pytest.approx((5 + 25 * 0.5) / 30)
    write_run_report(tmp_path / "a")
    check_png(tmp_path / "a" / "condensation.png")
    axes = condensation_figure(read_run(tmp_path / "a"), ["layer_00", "layer_01"]).axes[0]
    assert [line.get_ydata()[[0, -1]].tolist() for line in axes.get_lines()] == [[1.0, 0.7], [1.0, 0.3]]
    write_run_report(make_run(tmp_path / "b", 30))
    assert not (tmp_path / "b" / "condensation.png").exists()
