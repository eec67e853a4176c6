"""A small real corpus, and options for runs that take seconds."""

import json
import sysconfig
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """About 150 KB of the standard library as .jsonl, with its cache beside it: {"data", "cache_dir"}."""
    folder = tmp_path_factory.mktemp("corpus")
    sources = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))[:60]
    lines = [json.dumps({"text": p.read_text(encoding="utf-8", errors="ignore")[:2500]}) for p in sources]
    (folder / "code.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return {"data": str(folder / "code.jsonl"), "cache_dir": str(folder / "cache")}


@pytest.fixture
def small(corpus, tmp_path):
    """Settings of a tiny float64 run; override what a test is about."""

    def make(**changes):
        settings = {
            **corpus,
            "out": str(tmp_path / "run"),
            "recipe": "vanilla_dedup",
            "device": "cpu",
            "dtype": "float64",
            "vocab_size": 300,
            "layers": 2,
            "hidden_size": 32,
            "heads": 2,
            "experts": 4,
            "expert_hidden_size": 32,
            "sequence_length": 32,
            "batch_size": 8,
            "steps": 6,
            "eval_every": 0,
            "eval_batches": 1,
            "checkpoint_every": 3,
            "tensorboard": False,
            "profile_attention": False,
        }
        return settings | changes

    return make


@pytest.fixture
def as_arguments():
    """Settings -> command line."""

    def convert(settings):
        out = []
        for name, value in settings.items():
            option = "--" + name.replace("_", "-")
            if isinstance(value, bool):
                out.append(option if value else option.replace("--", "--no-", 1))
            else:
                out += [option, str(value)]
        return out

    return convert
