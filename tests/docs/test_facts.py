"""What pages say about the code and about files beside them, compared with both."""

import re

from luffy.recipes import RECIPES
from tests.docs.commands import GUIDES, RESEARCH, ROOT
from tests.test_architecture import RANKS

PAGES = "".join(page.read_text("utf-8") for page in [*GUIDES, *RESEARCH])


def test_results_and_figures_are_linked_from_a_page() -> None:
    for folder in ("results", "figures"):
        files = [f"{folder}/{path.name}" for path in sorted((ROOT / "docs" / folder).iterdir())]
        assert [name for name in files if f"{name})" not in PAGES] == []


def test_scripts_named_by_the_table_of_numbers_are_there() -> None:
    table = (ROOT / "docs" / "research" / "index.md").read_text("utf-8").partition("## Numbers")[2]
    names = re.findall(r"`([a-z_]+(?:\.py)?)`", table)
    assert len(names) > 15 and [name for name in names if not (ROOT / "benchmarks" / name).exists()] == []


def test_the_recipes_that_a_block_takes_are_listed() -> None:
    page = " ".join((ROOT / "docs" / "own_model.md").read_text("utf-8").split())
    listed = re.search(r"where they are between layers: (.*?)\. ", page)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == {r.name for r in RECIPES.values() if not (r.moves or r.auto)}
    assert "`auto` is refused" in page


def test_the_order_of_imports_is_the_one_that_is_enforced() -> None:
    page = " ".join((ROOT / "docs" / "architecture.md").read_text("utf-8").split())
    told = re.search(r"Imports go one way: (.*?)\. ", page)
    assert told is not None
    ranks = [{RANKS[name.strip()] for name in step.split(",")} for step in told[1].split("->")]
    assert all(len(r) == 1 for r in ranks) and sorted(r.pop() for r in ranks) == list(range(len(ranks)))
    assert set(re.findall(r"[a-z]+", told[1])) >= {n for n in RANKS if "." not in n} - {
        "errors", "inputs", "ranges", "signals", "version", "condensation", "wire_format", "__main__"
    }  # fmt: skip


def test_every_recipe_is_in_the_guide_to_recipes() -> None:
    page = (ROOT / "docs" / "recipes.md").read_text("utf-8")
    assert [name for name in RECIPES if f"`{name}`" not in page] == []
