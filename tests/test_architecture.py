"""The architecture as a test: imports go one way, one package talks to the network, files stay small.

Imports are read from the syntax tree, inside functions and `if TYPE_CHECKING` too: a dependency in disguise is one.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from luffy.recipes import Recipe

ROOT = Path(__file__).resolve().parent.parent
MAX_LINES = 400
SOURCE_SUFFIXES = {".py", ".sh", ".j2", ".cu", ".cpp", ".h"}

# A module may import what has its own rank or a lower one. A module may have a rank other than its package's.
RANKS = {
    "errors": 0, "inputs": 0, "ranges": 0, "signals": 0, "version": 0, "config": 0, "condensation": 0, "recipes": 0,
    "wire_format": 0,
    "data": 1, "plan": 1, "report": 1, "kernels": 1, "seats": 1,
    "comm": 2, "lab": 2,
    "exchange": 3, "seats.sharing": 3, "seats.exchange": 3,
    "compose": 4,
    "model": 5,
    "train": 6, "hf": 6, "titan": 6, "__main__": 6,
    "testing": 7,
}  # fmt: skip
MAY_USE_TORCH_DISTRIBUTED = {"comm", "train", "testing"}
# What a recipe says is made into objects by luffy.compose; these are given the objects, and never ask.
MAY_NOT_READ_A_RECIPE = {"data", "plan", "kernels", "seats", "comm", "lab", "exchange", "model"}


def module_name(path: Path, root: Path = ROOT) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported_names(tree: ast.AST, module: str, is_package: bool) -> Iterator[str]:
    """Absolute dotted names of all imports; `from a import b` gives `a.b`, whether b is a module or not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parts = module.split(".")
                parts = parts[: len(parts) - node.level + is_package]
                base = ".".join([*parts, base] if base else parts)
            yield from (f"{base}.{alias.name}" for alias in node.names)


def attribute_names(tree: ast.AST) -> Iterator[str]:
    """Dotted expressions such as `torch.distributed.all_reduce`."""
    for node in ast.walk(tree):
        parts: list[str] = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if parts and isinstance(node, ast.Name):
            yield ".".join([node.id, *reversed(parts)])


def is_under(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def rank_of(module: str) -> int:
    """Of `luffy.a.b.c`: that of a.b where it has one of its own, else of a."""
    parts = module.split(".")[1:3]
    return RANKS.get(".".join(parts), RANKS[parts[0]])


def _asks_type_checking(node: ast.If) -> bool:
    return isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What a module of the package `luffy` does against the rules."""
    tree = ast.parse(source, filename=module)
    if module == "luffy":  # what only type checkers read takes no time
        tree.body = [node for node in tree.body if not (isinstance(node, ast.If) and _asks_type_checking(node))]
    imports = list(imported_names(tree, module, is_package))
    part = module.split(".")[1] if "." in module else None
    if part is not None and part not in RANKS:
        return [f"{module}: `{part}` has no place in the order of imports; give it one in {Path(__file__).name}"]
    found = []
    for name in imports:
        if not is_under(name, "luffy") or name == "luffy.__version__":
            continue
        target = name.split(".")[1] if "." in name else "luffy"
        if target not in RANKS:
            found.append(f"{module} imports {name}: name the module that defines it")
        elif part is None and target != "version":
            found.append(f"{module} imports {name}: `import luffy` alone must stay instant")
        elif part is not None and rank_of(name) > rank_of(module):
            found.append(f"{module} imports {name}: {part} stands below {target}")
    if part not in MAY_USE_TORCH_DISTRIBUTED:
        used = [name for name in [*imports, *attribute_names(tree)] if is_under(name, "torch.distributed")]
        found += [f"{module} uses {name}: only luffy.comm talks to the network" for name in dict.fromkeys(used)]
    return found


def fields_read_of_a_recipe(source: str) -> list[str]:
    """`recipe.placement`, `self.runtime.recipe.placement`: fields read of what is called a recipe, its name aside."""
    fields = {field.name for field in dataclasses.fields(Recipe)} - {"name", "summary"} | {"moves", "wire_spec"}
    found = []
    for name in attribute_names(ast.parse(source)):
        *_, owner, field = name.split(".")
        if owner.endswith("recipe") and field in fields:
            found.append(name)
    return found


def sources(*folders: str) -> list[Path]:
    paths = (path for folder in folders for path in sorted((ROOT / folder).rglob("*")))
    return [path for path in paths if path.suffix in SOURCE_SUFFIXES and path.is_file()]


def test_the_package_keeps_its_architecture() -> None:
    paths = [path for path in sources("luffy") if path.suffix == ".py"]
    assert len(paths) > 10, "the package was not found"
    found = [
        problem
        for path in paths
        for problem in violations(path.read_text("utf-8"), module_name(path), path.stem == "__init__")
    ]
    assert not found, "\n".join(found)


def test_only_what_composes_reads_recipes() -> None:
    paths = [path for path in sources(*(f"luffy/{part}" for part in MAY_NOT_READ_A_RECIPE)) if path.suffix == ".py"]
    assert len(paths) > 50, "the packages were not found"
    found = [f"{module_name(path)} reads {name}: ask an object that luffy.compose makes"
             for path in paths for name in fields_read_of_a_recipe(path.read_text("utf-8"))]  # fmt: skip
    assert not found, "\n".join(found)
    composing = (ROOT / "luffy" / "compose.py").read_text("utf-8")
    assert {"self.recipe.copies", "recipe.residency"} <= set(fields_read_of_a_recipe(composing)), "the probe is blind"


def test_files_stay_small() -> None:
    sizes = {path: len(path.read_text("utf-8").splitlines()) for path in sources("luffy", "tests", "benchmarks")}
    big = {str(path.relative_to(ROOT)): size for path, size in sizes.items() if size > MAX_LINES}
    assert not big, f"above {MAX_LINES} lines, to be split: {big}"


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("luffy.plan.cost", "import luffy.comm.mesh"),
        ("luffy.plan.cost", "from luffy import comm"),
        ("luffy.plan.cost", "from ..comm import Mesh"),
        ("luffy.plan.cost", "def f():\n    from luffy.train import metrics"),
        ("luffy.plan.cost", "if TYPE_CHECKING:\n    from luffy.model import Model"),
        ("luffy.seats.seater", "from luffy.comm import Comm"),
        ("luffy.plan.replay", "from luffy.seats.exchange import exchange"),
        ("luffy.data.loader", "import torch.distributed as dist"),
        ("luffy.data.loader", "from torch import distributed"),
        ("luffy.model.router", "import torch\nx = torch.distributed.get_rank()"),
        ("luffy.report.html", "from luffy.train.metrics import read_metrics"),
        ("luffy.train.trainer", "from luffy.testing import run_ranks"),
        ("luffy.lab.processes", "from luffy.train.launch import launch"),
        ("luffy.lab.probe", "import torch.distributed"),
        ("luffy.exchange.direct", "from luffy.compose import Runtime"),
        ("luffy.compose", "from luffy.model.moe_layer import MoELayer"),
        ("luffy.plan.seats", "from luffy.seats.sharing import share"),
        ("luffy.helpers", "import os"),
        ("luffy", "from luffy.train.trainer import Trainer"),
    ],
)
def test_a_violation_is_seen(module: str, source: str) -> None:
    assert violations(source, module)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("luffy.plan.cost", "from luffy.plan.topology import Topology\nfrom . import traffic"),
        ("luffy.exchange.dispatch", "from luffy.comm import Comm\nfrom luffy.kernels import permute"),
        ("luffy.seats.sharing", "from luffy.comm import Comm"),
        ("luffy.comm.collectives", "import torch.distributed as dist\ndist.all_reduce(x)"),
        ("luffy.train.metrics", "from luffy.report.runs import totals\nfrom luffy.version import __version__"),
        ("luffy.model.moe_layer", "from luffy.compose import Runtime"),
        ("luffy.compose", "from luffy.exchange.direct import Direct\nfrom luffy.recipes import Recipe"),
        ("luffy.testing.oracle", "from luffy.train.trainer import Trainer"),
        ("luffy.lab.spec", "from luffy.plan.topology import parse_rate"),
        ("luffy.train.launch", "from luffy.lab.place import take_place"),
        ("luffy", "from luffy.version import __version__"),
        ("luffy.report.html", "from luffy import __version__"),
    ],
)
def test_what_is_allowed_passes(module: str, source: str) -> None:
    assert violations(source, module) == []


def test_relative_imports_are_resolved_from_a_package() -> None:
    assert list(imported_names(ast.parse("from ..comm import Mesh"), "luffy.plan", True)) == ["luffy.comm.Mesh"]
    assert list(imported_names(ast.parse("from .cost import f"), "luffy.plan", True)) == ["luffy.plan.cost.f"]
