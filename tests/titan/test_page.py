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
        assert run["ways"]["luffy"]["exchange_bytes"] < run["ways"]["torchtitan"]["exchange_bytes"]
