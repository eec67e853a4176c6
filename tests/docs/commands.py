"""The commands that pages show, one by one, ready to be parsed or run."""

import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
GUIDES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
RESEARCH = sorted((ROOT / "docs" / "research").glob("*.md"))
FENCE = re.compile(r"^```(\w*)\n(.*?)^```", flags=re.DOTALL | re.MULTILINE)
SHELL = ("sh", "bash")


@dataclass(frozen=True)
class Shown:
    """A command of a page. words: without comment, sudo, and dots; abridged: three dots stood for other options."""

    page: str
    words: tuple[str, ...]
    abridged: bool = False

    @property
    def program(self) -> str:
        return Path(self.words[0]).name if self.words[0] != "." else "."

    @property
    def luffy(self) -> tuple[str, ...] | None:
        """What follows `luffy`, if this command calls it: by name, as a module, or as the entry point of an image."""
        words = self.words
        if self.program == "luffy":
            return words[1:]
        if "luffy.train.cli" in words:
            return words[words.index("luffy.train.cli") + 1 :]
        if words[:2] == ("docker", "run"):
            return words[words.index("luffy") + 1 :]
        return None

    def __str__(self) -> str:
        return " ".join(self.words)


def fences(page: Path) -> list[tuple[str, str]]:
    """(language, content) of a page's fenced blocks."""
    return FENCE.findall(page.read_text("utf-8"))


def blocks(page: Path) -> list[str]:
    return [content for language, content in fences(page) if language in SHELL]


def shown(pages: list[Path]) -> Iterator[Shown]:
    for page in pages:
        for block in blocks(page):
            for line in block.replace("\\\n", " ").splitlines():
                yield from split(line, page.name)


def split(line: str, page: str) -> Iterator[Shown]:
    """A line is one command, or several with semicolons between. A script in `bash -c` is lines of its own."""
    found: list[list[str]] = [[]]
    for word in shlex.split(line, comments=True):
        found[-1].append(word.removesuffix(";"))
        if word.endswith(";"):
            found.append([])
    for words in found:
        if words[-3:-1] == ["bash", "-c"]:
            yield from split(words[-1], page)
            words = words[:-3]
        kept = tuple(w for w in words if w not in ("sudo", "..."))
        if kept:
            yield Shown(page, kept, "..." in words)


def spans(page: Path) -> list[str]:
    """The code spans of a page, outside its blocks."""
    return re.findall(r"`([^`\n]+)`", FENCE.sub("", page.read_text("utf-8")))


def own_script() -> str:
    """own.py, as docs/own_model.md prints it."""
    return next(c for language, c in fences(ROOT / "docs" / "own_model.md") if language == "python" and "STEPS" in c)
