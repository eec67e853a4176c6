"""Folders and data that come from somewhere else: no path leads out, and what is damaged is one line."""

import gzip
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from luffy.data.formats import read_records
from luffy.errors import UserError
from luffy.hf.files import INDEX, Checkpoint


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", "sub/x.safetensors", "..", 5])
def test_an_index_names_files_of_its_own_folder_only(tmp_path: Path, file: object) -> None:
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for path in (tmp_path / "secret.safetensors", folder / "sub" / "x.safetensors"):
        save_file({"a": torch.ones(2)}, path)
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    with pytest.raises(UserError, match=r"--model: .*index.json .*fetch it again"):
        Checkpoint(folder)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin-1"), "not UTF-8"),
        ("plain.jsonl.gz", b'{"text": "no gzip"}\n', "damaged gzip"),
        ("cut.jsonl.gz", gzip.compress(b'{"text": "a"}\n' * 1000)[:-20], "damaged gzip"),
    ],
    ids=["latin", "plain", "cut"],  # compressed bytes hold the time: as names they would differ from run to run
)
def test_damaged_data_is_one_line(tmp_path: Path, name: str, content: bytes, words: str) -> None:
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(UserError, match=rf"--data .*{name}.* is .*{words}") as caught:
        list(read_records(path))
    assert "\n" not in str(caught.value)
