"""The commands that pages show, one by one, ready to be parsed or run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESEARCH = sorted((ROOT / "docs" / "research").glob("*.md"))


@dataclass(frozen=True)
class Shown:
    """A line of a page. words: without comment, sudo, and the three dots that stand for other options."""

    page: str
    words: tuple[str, ...]

    @property
    def luffy(self) -> tuple[str, ...] | None:
        """What follows `luffy`, if this line calls it: by name or as a module."""
        words = self.words
        if words and Path(words[0]).name == "luffy":
            return words[1:]
        if "luffy.train.cli" in words:
            return words[words.index("luffy.train.cli") + 1 :]
        return None


def blocks(page: Path) -> list[str]:
    return re.findall(r"^```(?:sh|bash)\n(.*?)^```", page.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)


def shown(pages: list[Path]) -> Iterator[Shown]:
    for page in pages:
        for block in blocks(page):
            for line in (
                block.replace("\\\n", " ").replace("bash -c '", "").replace("runs/mine'", "runs/mine").splitlines()
            ):
                for command in split(line):
                    yield Shown(page.name, command)


def split(line: str) -> list[tuple[str, ...]]:
    """A line is one command, or several with semicolons between."""
    words = [w for w in shlex.split(line, comments=True) if w not in ("sudo", "...")]
    found: list[list[str]] = [[]]
    for word in words:
        found[-1].append(word.removesuffix(";"))
        if word.endswith(";"):
            found.append([])
    return [tuple(words) for words in found if words]
