"""Shards give back what was written, and damage is found when they are opened."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from tokenizers import models, pre_tokenizers

from luffy.data import TokenCorpus, Tokenizer, build_shards, open_corpus, train_tokenizer
from luffy.data.corpus import SplitName
from luffy.data.shards import read_manifest, write_manifest
from luffy.errors import UserError

from .conftest import sentences

TEXTS = sentences(30)
TOKENIZER = train_tokenizer(TEXTS, 300)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Twenty-five training documents over several shards, five held out."""
    folder = tmp_path / "shards"
    folder.mkdir()
    documents: list[tuple[SplitName, str]] = [
        ("valid" if index % 6 == 5 else "train", text) for index, text in enumerate(TEXTS)
    ]
    build_shards(folder, documents, TOKENIZER, fingerprint="abc", num_empty=2, shard_tokens=500)
    return folder


def test_documents_come_back_across_shards(folder: Path) -> None:
    corpus = open_corpus(folder)
    expected = TOKENIZER.encode_batch([text for index, text in enumerate(TEXTS) if index % 6 != 5])
    train = corpus.train
    assert len(train.shards) > 3 and train.num_documents == 25 and corpus.valid.num_documents == 5
    for index, tokens in enumerate(expected):
        np.testing.assert_array_equal(train.document(index), tokens)
    np.testing.assert_array_equal(train.document_lengths(), [len(tokens) for tokens in expected])
    assert train.num_tokens == sum(map(len, expected))
    assert corpus.tokenizer.decode(corpus.valid.document(0)) == TEXTS[5]
    for outside in (-1, 25):
        with pytest.raises(IndexError):
            train.document(outside)


def test_corpus_tells_its_vocabulary(folder: Path) -> None:
    corpus = open_corpus(str(folder))
    assert (corpus.vocab_size, corpus.eos_id, corpus.mask_id, corpus.num_empty_documents) == (300, 0, 1, 2)
    assert corpus.tokenizer_path == folder / "tokenizer.json" and corpus.fingerprint == "abc"
    assert not corpus.train.document(0).flags.writeable


def test_pickles_are_small_even_after_reading(folder: Path) -> None:
    corpus = open_corpus(folder)
    before = len(pickle.dumps(corpus))
    corpus.train.document(3), corpus.valid.document(0), corpus.tokenizer
    data = pickle.dumps(corpus)
    assert len(data) == before
    again: TokenCorpus = pickle.loads(data)
    np.testing.assert_array_equal(again.train.document(3), corpus.train.document(3))
    assert again == corpus


@pytest.mark.parametrize(("num_ids", "dtype"), [(1 << 16, "uint16"), ((1 << 16) + 1, "uint32")])
def test_ids_are_as_narrow_as_the_vocabulary_allows(tmp_path: Path, num_ids: int, dtype: str) -> None:
    vocabulary = {f"w{index}": index for index in range(num_ids - 1)} | {"</s>": num_ids - 1}
    backend = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.save(str(tmp_path / "t.json"))
    build_shards(
        tmp_path,
        [("train", f"w{num_ids - 2} w1"), ("valid", "w2")],
        Tokenizer.from_file(tmp_path / "t.json"),
        fingerprint="",
    )
    corpus = open_corpus(tmp_path)
    assert corpus.train.document(0).dtype == dtype
    assert corpus.train.document(0).tolist() == [num_ids - 2, 1]
    with pytest.raises(UserError, match="no mask token"):
        _ = corpus.mask_id


def flip_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    "name", ["train-00001.bin", "train-00000.idx", "valid-00000.bin", "tokenizer.json", "manifest.json"]
)
@pytest.mark.parametrize("damage", ["flip", "truncate", "lengthen", "remove"])
def test_damage_is_found(folder: Path, name: str, damage: str) -> None:
    path = folder / name
    if damage == "flip":
        flip_bit(path)
    elif damage == "remove":
        path.unlink()
    else:
        data = path.read_bytes()
        path.write_bytes(data[:-1] if damage == "truncate" else data + b"x")
    with pytest.raises(UserError) as caught:
        open_corpus(folder)
    message = str(caught.value)
    assert message.startswith(f"{folder} is damaged (") and message.endswith(f"delete {folder} and run again")


def test_altered_manifest_and_other_versions(folder: Path) -> None:
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "eos_id": 7}))
    with pytest.raises(UserError, match="is damaged"):
        open_corpus(folder)
    (folder / "manifest.json").write_text(json.dumps([manifest]))
    with pytest.raises(UserError, match="is damaged"):
        open_corpus(folder)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    write_manifest(folder, {**read_manifest(folder), "version": 99})
    with pytest.raises(UserError, match="another version of luffy; delete"):
        open_corpus(folder)


def test_checksums_can_be_left_to_another_process(folder: Path) -> None:
    flip_bit(folder / "train-00000.bin")
    open_corpus(folder, verify_checksums=False)
    (folder / "train-00000.bin").write_bytes(b"")
    with pytest.raises(UserError, match="0 bytes instead of"):
        open_corpus(folder, verify_checksums=False)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        open_corpus(tmp_path / "none")
