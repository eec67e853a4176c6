"""The page of a comparison: whole, self-contained, and readable in a real browser on a phone and on a desk."""

import html
import json
import re
import shutil
import subprocess
import warnings
from pathlib import Path

import numpy as np
import pytest

from luffy.errors import UserError
from luffy.report.compare import write_compare_report
from luffy.report.compare_structure import matrices_figure, matrix_of
from luffy.report.html import write_run_report

from .synthetic import NAMES, Page, make_comparison, make_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
WITHOUT = "no Chromium here: pages are not looked at (apt install chromium)"
if CHROMIUM is None:
    warnings.warn(WITHOUT, stacklevel=1)  # in the summary of every run, where a skipped test would be a letter


def test_a_page_shows_everything_that_was_recorded(tmp_path: Path) -> None:
    path = write_compare_report(make_comparison(tmp_path))
    text = path.read_text("utf-8")
    page = Page(text)
    assert text.startswith("<!DOCTYPE html>") and not re.search(r"<script|<link|@import|url\(", text)
    assert all(resource.startswith("data:image/svg+xml;base64,") for resource in page.resources)
    captions = [image["alt"] or "" for image in page.images]
    # losses by time and by bytes, phases, directions, links, matrices, favourite rank, kept rows
    assert len(captions) == len(set(captions)) == 8
    for name in NAMES:
        assert name in text
    assert "peer*" in text and "<li>pairs travel &lt;one by one&gt;</li>" in text
    assert "exchange, hidden" in text and "roofline" in text and "emulated" in text
    before = path.read_bytes()
    assert write_compare_report(tmp_path).read_bytes() == before  # the same numbers, the same page


@pytest.mark.slow
def test_a_comparison_of_bare_runs_has_no_empty_pictures(tmp_path: Path) -> None:
    folder = make_comparison(tmp_path)
    summaries = json.loads((folder / "compare.json").read_text())
    for s in summaries:
        s |= {"traffic": None, "kept_by_layer": None, "step_bytes_by_link": {"intra_node": 1.0, "inter_node": 0.0}}
        for record_file in [folder / name / "metrics.jsonl" for name in s["folders"]]:
            record_file.write_text(record_file.read_text().replace('"locality"', '"unknown"'))
    (folder / "compare.json").write_text(json.dumps(summaries))
    assert len(Page(write_compare_report(folder).read_text()).images) == 4
    for s in summaries:
        s["roofline"] = None
    (folder / "compare.json").write_text(json.dumps(summaries))
    assert "oofline" not in write_compare_report(folder).read_text()  # no word of a column that is not there


def test_matrices_are_means_of_a_step_without_what_stays() -> None:
    summary = {"label": "a", "traffic": {"steps": 4, "bytes": [[99, 8], [4, 99]]}}
    np.testing.assert_array_equal(matrix_of(summary), [[0, 2], [1, 0]])
    assert matrix_of({"traffic": {"steps": 0, "bytes": [[0, 0], [0, 0]]}}) is None
    figure = matrices_figure([summary, summary | {"label": "b", "traffic": {"steps": 4, "bytes": [[0, 2], [1, 0]]}}])
    assert figure is not None
    titles = [axes.get_title() for axes in figure.axes]
    assert titles[:2] == ["a\n3 B", "b\n0.75 B (-75%)"]


def test_a_folder_without_a_comparison_is_the_users_mistake(tmp_path: Path) -> None:
    for content in (None, "{", "{}", '[{"recipe": "x"}]'):
        if content is not None:
            (tmp_path / "compare.json").write_text(content)
        with pytest.raises(UserError, match=r"--out: .*compare\.json"):
            write_compare_report(tmp_path)


# ---------------------------------------------------------------- in a browser

# The page stands in a frame of the wanted width (a browser's own window may refuse to be so narrow), which a script
# around it measures: what is wider than the frame, and which pictures did not load.
WRAPPER = """<!DOCTYPE html><body><iframe style="width:WIDTHpx;height:800px;border:0" srcdoc="PAGE"></iframe><script>
const frame = document.querySelector("iframe");
frame.addEventListener("load", async () => {
  const page = frame.contentDocument, root = page.documentElement, found = [];
  const images = [...page.images];
  await Promise.all(images.map(i => i.decode().catch(() => found.push("broken picture " + i.alt))));
  const style = e => frame.contentWindow.getComputedStyle(e);
  const scrolls = e => e && (["auto", "scroll"].includes(style(e).overflowX) || scrolls(e.parentElement));
  if (root.scrollWidth > WIDTH) found.push("the page is " + root.scrollWidth + " wide");
  for (const e of page.body.querySelectorAll("*")) {
    const box = e.getBoundingClientRect();
    if (box.width && (box.right > WIDTH + 0.5 || box.left < -0.5) && !scrolls(e.parentElement))
      found.push(e.tagName + " reaches " + Math.round(box.right) + ": " + e.textContent.slice(0, 40));
    if (e.closest(".tiles") && e.scrollWidth > e.clientWidth + 1 && e.clientWidth)
      found.push(e.tagName + " is too narrow for " + e.textContent.trim().slice(0, 40));
    if (NARROW && style(e).overflowX == "auto" && e.scrollWidth > e.clientWidth + 1)
      found.push(e.tagName + " must be scrolled: " + e.getAttribute("aria-label"));
  }
  const out = document.createElement("pre");
  out.id = "found";
  out.textContent = JSON.stringify({found, pictures: images.length, background: style(page.body).backgroundColor});
  document.body.append(out);
});
</script></body>"""


def look_at(page: Path, width: int, folder: Path) -> dict:
    """What is wrong with a page at `width`, as Chromium lays it out. Fails on any message of its console."""
    folder.mkdir(parents=True)
    wrapped = folder / "wrapped.html"
    text = WRAPPER.replace("WIDTH", str(width)).replace("NARROW", "true" if width < 500 else "false")
    wrapped.write_text(text.replace("PAGE", html.escape(page.read_text("utf-8"), quote=True)), encoding="utf-8")
    command = [str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += [f"--user-data-dir={folder / 'profile'}", "--enable-logging=stderr", "--virtual-time-budget=20000"]
    command += ["--window-size=1400,900", "--dump-dom", wrapped.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr[-2000:]
    console = [line for line in done.stderr.splitlines() if "CONSOLE" in line]
    assert not console, console
    seen = re.search(r'<pre id="found">(.*?)</pre>', done.stdout, re.DOTALL)
    assert seen, "the page was not laid out in time"
    return json.loads(html.unescape(seen[1]))


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_overflows_in_a_browser(tmp_path: Path, width: int) -> None:
    compared = write_compare_report(make_comparison(tmp_path / "compare", ranks=8))
    seen = look_at(compared, width, tmp_path / "compare-look")
    assert seen["found"] == [] and seen["pictures"] == 8
    single = write_run_report(make_run(tmp_path / "run", 40))
    seen = look_at(single, width, tmp_path / "run-look")
    assert seen["found"] == [] and seen["pictures"] == 7


@pytest.mark.skipif(CHROMIUM is None, reason=WITHOUT)
def test_the_browser_check_sees_what_overflows(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    picture = '<img alt="gone" src="data:image/svg+xml;base64,AAAA">'
    page.write_text(f'<!DOCTYPE html><body style="margin:0"><div style="width:500px">too wide</div>{picture}</body>')
    found = " ".join(look_at(page, 390, tmp_path / "look")["found"])
    assert "page is 500 wide" in found and "DIV reaches 500" in found and "broken picture gone" in found
