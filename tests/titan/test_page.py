"""docs/torchtitan.md shows what docs/results/torchtitan.json holds."""

import json
from pathlib import Path

from benchmarks.titan import WAYS, table

ROOT = Path(__file__).parents[2]


def test_the_page_shows_the_measured_tables() -> None:
    found = json.loads((ROOT / "docs" / "results" / "torchtitan.json").read_text("utf-8"))
    page = (ROOT / "docs" / "torchtitan.md").read_text("utf-8")
    links = {run["link"] for run in found["runs"]}
    assert {"none", "1gbit"} <= links
    for link in links:
        assert table(found["runs"], link) in page, link
    for run in found["runs"]:
        assert set(run["ways"]) == set(WAYS)
        share = run["ways"]["luffy"]["exchange_bytes"] / run["ways"]["torchtitan"]["exchange_bytes"]
        # 8 of 64 experts; 3 of 8, of which two a rank share nothing: ids and weights then come on top.
        bounds = {("qwen3", 2): 0.3, ("qwen3", 4): 0.55, ("deepseek_v3", 2): 0.7, ("deepseek_v3", 4): 1.02}
        assert share < bounds[run["model"], run["ranks"]]
