"""What is held out for validation, and what trains the tokenizer."""

from pathlib import Path

import pytest

from luffy.data.heldout import choose_held_out, hash_index, survey_corpus
from luffy.errors import UserError

from .conftest import sentences, write_jsonl
from .helpers import build, texts_of


def test_named_files_decide(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sentences(10))
    write_jsonl(tmp_path / "valid.jsonl", ["held out one", "", "held out two"])
    corpus, _ = build(tmp_path, tmp_path / "cache")
    assert texts_of(corpus, "valid") == ["held out one", "held out two"]
    assert corpus.train.num_documents == 10 and corpus.num_empty_documents == 1


def test_only_held_out_files_hold_text(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", [""])
    write_jsonl(tmp_path / "valid.jsonl", ["text"])
    with pytest.raises(UserError, match="only the held-out files hold text"):
        build(tmp_path, tmp_path / "cache")


def test_a_single_document_is_cut_by_characters(tmp_path: Path) -> None:
    text = " ".join(sentences(20))
    corpus, _ = build(write_jsonl(tmp_path / "a.jsonl", [text]), tmp_path / "cache", valid_fraction=0.1)
    (train,), (valid,) = texts_of(corpus, "train"), texts_of(corpus, "valid")
    assert train + valid == text and len(valid) == int(0.1 * len(text))


def test_few_and_uneven_documents(tmp_path: Path) -> None:
    def lengths_held_out(lengths: list[int], fraction: float) -> tuple[list[int], tuple[int, int] | None]:
        path = write_jsonl(tmp_path / "a.jsonl", ["x" * length for length in lengths])
        chosen = choose_held_out(survey_corpus(path, "text"), fraction)
        return [length for length, held in zip(lengths, chosen.is_valid, strict=True) if held], chosen.cut

    assert lengths_held_out([50, 40, 60], 0.02) == ([40], None)  # the smallest, when all exceed the share
    assert lengths_held_out([1000, 3], 0.1) == ([3], (0, 903))  # a crumb is topped up from the giant
    assert lengths_held_out([1], 0.5) == ([], None)  # nothing to hold out
    assert lengths_held_out([2], 0.01) == ([], (0, 1))
    assert lengths_held_out([10] * 200, 0.1) == ([10] * 20, None)
    with_giant = [10] * 200
    with_giant[min(range(200), key=hash_index)] = 8000  # drawn first, but larger than the share
    assert lengths_held_out(with_giant, 0.02) == ([10] * 19, None)


def test_held_out_text_does_not_train_the_tokenizer(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", sentences(3))
    write_jsonl(tmp_path / "valid.jsonl", ["secret"])
    assert survey_corpus(tmp_path, "text").sample == sentences(3)


def test_the_sample_is_bounded_and_spread(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", sentences(300))
    sample = survey_corpus(path, "text", sample_characters=5000).sample
    assert 5000 <= sum(map(len, sample)) < 6000
    places = [int(text.split(":")[0]) for text in sample]
    assert places == sorted(places) and places[0] < 75 and places[-1] > 225
    assert survey_corpus(path, "text", sample_characters=0).sample == []
