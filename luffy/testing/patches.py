"""Whether code has been patched since: what stood under the names of modules and classes."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

_ROOT = str(Path(__file__).parents[2])  # of luffy, and of its tests where there are any
_OTHERS = ("os", "time", "torch", "torch.cuda", "torch.distributed")  # whose functions tests patch besides
_FUNCTIONS = (FunctionType, BuiltinFunctionType)


class CodeState:
    """What stands under each name of luffy and its tests, and of a few functions of torch; what luffy's tables hold."""

    def __init__(self) -> None:
        self._then: list[tuple[Mapping[str, Any], dict[str, Any]]] = []
        self._tables: list[tuple[Any, Any]] = []
        for name, module in list(sys.modules.items()):
            file = str(getattr(module, "__file__", None) or "")
            if name in _OTHERS:
                self._then.append((vars(module), {k: v for k, v in vars(module).items() if type(v) in _FUNCTIONS}))
            elif isinstance(module, ModuleType) and file.startswith(_ROOT) and "site-packages" not in file:
                classes = [v for v in vars(module).values() if isinstance(v, type) and v.__module__ == name]
                self._then += [(vars(x), dict(vars(x))) for x in (module, *classes)]
                if name.startswith("luffy.") and not name.startswith("luffy.testing"):
                    tables = [v for k, v in vars(module).items() if type(v) in (dict, list, set) and k[:2] != "__"]
                    self._tables += [(table, table.copy()) for table in tables]

    def is_patched(self) -> bool:
        """Whether one of those names stands for something else by now. What was imported since is no patch."""
        return any(now.get(name, value) is not value for now, then in self._then for name, value in then.items())

    def is_extended(self) -> bool:
        """Whether something was put into one of luffy's tables, such as a family of models, or taken out."""
        return any(now.keys() != then.keys() if isinstance(now, dict) else now != then for now, then in self._tables)
