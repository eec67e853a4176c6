"""Small corpora and splits for the data tests."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest

from luffy.data.shards import SplitWriter
from luffy.data.token_corpus import TokenSplit

LINE = "the quick brown fox jumps over a lazy dog while rivers carry stones towards distant seas"
WORDS = LINE.split()


def sentences(num_documents: int, words_each: int = 60) -> list[str]:
    """Distinct texts, the same at every call."""
    generator = np.random.default_rng(7)
    return [
        f"{index}: " + " ".join(WORDS[k] for k in generator.integers(0, len(WORDS), words_each))
        for index in range(num_documents)
    ]


def write_jsonl(path: Path, texts: Sequence[object], field: str = "text") -> Path:
    path.write_text("".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts)))
    return path


@pytest.fixture
def corpus_file(tmp_path: Path) -> Path:
    return write_jsonl(tmp_path / "corpus.jsonl", sentences(40))


@pytest.fixture(scope="session")
def make_split(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., TokenSplit]:
    """Token shards of documents with the given lengths; tokens are 1, 2, 3, ..., all different."""
    root, numbers = tmp_path_factory.mktemp("splits"), itertools.count()

    def make(lengths: Sequence[int], shard_tokens: int = 50) -> TokenSplit:
        folder = root / str(next(numbers))
        folder.mkdir()
        writer = SplitWriter(folder, "train", "<u4", shard_tokens)
        first = 1
        for length in lengths:
            writer.append(np.arange(first, first + length))
            first += length
        return TokenSplit(folder, "train", "<u4", tuple(writer.close()))

    return make
