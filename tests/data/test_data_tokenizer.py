"""Tokenizers lose nothing, repeat exactly, and foreign files bring no surprises."""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import models, pre_tokenizers

from luffy.data import Tokenizer, train_tokenizer
from luffy.data import tokenizer as tokenizer_module
from luffy.data.tokenizer import MIN_VOCAB_SIZE
from luffy.errors import UserError

from .conftest import sentences

TRAINED = train_tokenizer(sentences(30), 320)


def save_words(path: Path, words: list[str]) -> Path:
    """A tokenizer.json of whole words, as another program would write it."""
    backend = tokenizers.Tokenizer(models.WordLevel({word: 3 * i for i, word in enumerate(words)}, unk_token=words[0]))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.enable_truncation(2)
    backend.enable_padding(length=5)
    backend.save(str(path))
    return path


@given(st.text(st.characters(exclude_categories=["Cs"])))
@settings(deadline=None, max_examples=60)
def test_decode_undoes_encode(text: str) -> None:
    (token_ids,) = TRAINED.encode_batch([text])
    assert token_ids.dtype == np.int64 and TRAINED.decode(token_ids) == text


def test_special_tokens_and_sizes() -> None:
    assert (TRAINED.eos_id, TRAINED.mask_id) == (0, 1)
    assert TRAINED.vocab_size == 320
    assert TRAINED.decode([0, 1, 2]) == "<|endoftext|><|mask|><|pad|>"
    assert train_tokenizer(["ab"], 9999).vocab_size <= MIN_VOCAB_SIZE + 2  # no more merges to be had
    assert TRAINED.encode_batch([]) == []


def test_text_that_spells_a_special_token_is_text() -> None:
    (token_ids,) = TRAINED.encode_batch(["a<|endoftext|>b<|mask|>"])
    assert not {0, 1, 2} & set(token_ids.tolist())
    assert TRAINED.decode(token_ids) == "a<|endoftext|>b<|mask|>"


@pytest.mark.parametrize("vocab_size", [0, MIN_VOCAB_SIZE - 1, 2**32 + 1])
def test_impossible_vocabularies(vocab_size: int) -> None:
    with pytest.raises(UserError, match="--vocab-size"):
        train_tokenizer(["x"], vocab_size)


def test_long_documents_are_encoded_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "\n".join(sentences(40))
    (whole,) = TRAINED.encode_batch([text])
    monkeypatch.setattr(tokenizer_module, "PART_CHARACTERS", 200)
    first, in_parts, last = TRAINED.encode_batch(["x", text, "y" * 999])
    np.testing.assert_array_equal(in_parts, whole)
    assert (TRAINED.decode(first), TRAINED.decode(last)) == ("x", "y" * 999)


def test_save_and_load_keep_the_fingerprint(tmp_path: Path) -> None:
    TRAINED.save(tmp_path / "tokenizer.json")
    for path in (tmp_path, tmp_path / "tokenizer.json"):
        loaded = Tokenizer.from_file(path)
        assert loaded.fingerprint() == TRAINED.fingerprint()
        assert (loaded.eos_id, loaded.mask_id, loaded.vocab_size) == (0, 1, 320)
    assert train_tokenizer(sentences(31), 320).fingerprint() != TRAINED.fingerprint()


def test_training_repeats_in_another_process() -> None:
    code = (
        "from tests.data.conftest import sentences; from luffy.data import train_tokenizer; "
        "print(train_tokenizer(sentences(30), 320).fingerprint())"
    )
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        root = Path(__file__).parents[2]
        out = subprocess.run(
            [sys.executable, "-c", code],
            env=environment,
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
        )
        assert out.stdout.strip() == TRAINED.fingerprint()


def test_foreign_tokenizer_neither_cuts_nor_pads(tmp_path: Path) -> None:
    loaded = Tokenizer.from_file(save_words(tmp_path / "t.json", ["[UNK]", "[SEP]", "[MASK]", "a", "b"]))
    assert (loaded.eos_id, loaded.mask_id, loaded.vocab_size) == (3, 6, 13)
    assert loaded.encode_batch(["a b a b c", "a"])[0].tolist() == [9, 12, 9, 12, 0]
    assert loaded.encode_batch(["a"])[0].tolist() == [9]


def test_missing_special_tokens(tmp_path: Path) -> None:
    path = save_words(tmp_path / "t.json", ["<unk>", "</s>", "<|endoftext|>"])
    loaded = Tokenizer.from_file(path)
    assert loaded.eos_id == 6  # the better of the two names
    with pytest.raises(UserError, match=r"--tokenizer .*t\.json has no mask token"):
        _ = loaded.mask_id
    with pytest.raises(UserError, match=r"--tokenizer .*t\.json has no end-of-text token"):
        Tokenizer.from_file(save_words(path, ["<unk>", "a"]))


def test_unreadable_tokenizer_files(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--tokenizer .* does not exist"):
        Tokenizer.from_file(tmp_path / "none.json")
    with pytest.raises(UserError, match=r"--tokenizer .* does not exist"):
        Tokenizer.from_file(tmp_path)
    for content in ("{", json.dumps({"model": {}}), ""):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(UserError, match=r"--tokenizer .*not a readable tokenizer\.json") as caught:
            Tokenizer.from_file(tmp_path / "bad.json")
        assert "\n" not in str(caught.value)


def test_the_environment_is_respected(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TOKENIZERS_PARALLELISM", raising=False)
    TRAINED.encode_batch(["x"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "off"
    monkeypatch.setenv("TOKENIZERS_PARALLELISM", "true")
    TRAINED.encode_batch(["x"])
    assert os.environ["TOKENIZERS_PARALLELISM"] == "true"


def test_a_forked_child_encodes_without_hanging_or_warning() -> None:
    code = """
import os, signal
from luffy.data import train_tokenizer
tokenizer = train_tokenizer(["some words to learn"] * 50, 300)
expected = [ids.tolist() for ids in tokenizer.encode_batch(["some words"] * 50)]
child = os.fork()
if child == 0:
    signal.alarm(20)
    os._exit([ids.tolist() for ids in tokenizer.encode_batch(["some words"] * 50)] != expected)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    out = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False)
    assert (out.returncode, out.stderr) == (0, "")
