"""One thread a process, so that forked ranks share the cores fairly and sums keep their order; a small real corpus."""

import json
import sysconfig
from pathlib import Path

import pytest
import torch
from hypothesis import settings

torch.set_num_threads(1)
# The time of one example depends on what else the machine does; that says nothing about the code.
settings.register_profile("luffy", deadline=None)
settings.load_profile("luffy")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """About 150 KB of the standard library as .jsonl, with its cache beside it: {"data", "cache_dir"}."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    lines = [json.dumps({"text": p.read_text(encoding="utf-8", errors="ignore")[:2500]}) for p in sources]
    (folder / "code.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"data": str(folder / "code.jsonl"), "cache_dir": str(folder / "cache")}
