"""Tables in the documentation: each has its header once, rows of as many cells, and says what was measured."""

from __future__ import annotations

import importlib
import json
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def tables(page: Path) -> list[tuple[int, list[str]]]:
    """(line number, lines) of each table outside code."""
    found: list[tuple[int, list[str]]] = []
    in_code = in_table = False
    for number, line in enumerate(page.read_text(encoding="utf-8").splitlines(), start=1):
        in_code ^= line.startswith("```")
        if in_code or not line.lstrip().startswith("|"):
            in_table = False
            continue
        if not in_table:
            found.append((number, []))
            in_table = True
        found[-1][1].append(line.strip())
    return found


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line.strip("|"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_table_has_its_header_once_and_rows_of_as_many_cells(page: Path) -> None:
    for number, lines in tables(page):
        rules = [i for i, line in enumerate(lines) if re.fullmatch(r"\|[\s:|-]+\|", line)]
        assert rules == [1], f"{page.name}:{number}: the header stands {len(rules)} times"
        assert len(lines) > 2, f"{page.name}:{number}: no rows"
        assert {len(cells(line)) for line in lines} == {len(cells(lines[0]))}, f"{page.name}:{number}: uneven rows"
        assert all(any(cells(line)) for line in lines), f"{page.name}:{number}: an empty row"


def test_the_page_on_hugging_face_says_what_was_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    render = importlib.import_module("huggingface").table
    page = (ROOT / "docs" / "research" / "huggingface.md").read_text(encoding="utf-8")
    for path in sorted((ROOT / "docs" / "results").glob("huggingface*.json")):
        for way, found in json.loads(path.read_text(encoding="utf-8")).items():
            if isinstance(found, dict) and "systems" in found:
                assert {"transformers", "luffy"} <= {s["system"] for s in found["systems"]}, (path.name, way)
                assert render(found["systems"]) in page, f"no table of {path.name}, {way}"
