"""Checkpoint folders in the library's format: safetensors files, several of them with an index.

Headers are read and checked first: what each file should hold is known from its first bytes, so a truncated download
is named with the tensor that it breaks, before a byte of weights is read. Tensors are then read one by one, or as
slices of their first axis.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from luffy.errors import UserError
from luffy.hf.quantized import BLOCKS, INVERSE, SCALES, folded, from_fp8, from_mxfp4

INDEX = "model.safetensors.index.json"
SHARD_NUM_BYTES = 5_000_000_000


@dataclass(frozen=True)
class Entry:
    """Where a tensor is, under which name, and its shape."""

    file: Path
    shape: tuple[int, ...]
    key: str


def read_header(path: Path) -> dict[str, Entry]:
    """Names and shapes of a safetensors file. UserError, naming the first tensor affected, where it is cut short."""
    try:
        size = path.stat().st_size
        with open(path, "rb") as f:
            length = int.from_bytes(f.read(8), "little")
            header = json.loads(f.read(length)) if 8 + length <= size else None
    except (OSError, ValueError):
        header = None
    if header is None:
        raise UserError(f"--model: {path} is not a whole safetensors file (its header is damaged); fetch it again")
    header.pop("__metadata__", None)
    for name, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        if 8 + length + entry["data_offsets"][1] > size:
            raise UserError(f"--model: {path} is truncated: {name} is not whole; fetch it again")
    return {name: Entry(path, tuple(entry["shape"]), name) for name, entry in header.items()}


# What stands before the language model's names in folders of models that also see: Llama-4's way, and Qwen3.5's.
_LANGUAGE = (("language_model.model.", "model."), ("language_model.lm_head.", "lm_head."),
             ("model.language_model.", "model."), ("lm_head.", "lm_head."))  # fmt: skip


def language_model_of(entries: dict[str, Entry]) -> dict[str, Entry]:
    """The tensors of the language model alone, under the names that they have in a folder without another."""
    if not any("language_model." in name for name in entries):
        return entries
    prefixes = [(name, pair) for name in entries for pair in _LANGUAGE if name.startswith(pair[0])]
    return {new + name.removeprefix(old): entries[name] for name, (old, new) in prefixes}


class Checkpoint:
    """The tensors of a folder: `entries` by name."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.entries = folder, dict[str, Entry]()
        self._handles: dict[Path, Any] = {}
        index = folder / INDEX
        if index.exists():
            try:
                weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
                if not all(isinstance(file, str) for file in weight_map.values()):
                    raise TypeError("weight_map")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(f"--model: {index} cannot be read; fetch it again") from error
            for file in sorted(set(weight_map.values())):
                if Path(file).name != file or file == "..":
                    raise UserError(f"--model: {index} names {file!r}, which is no file of the folder; fetch it again")
                expected = [name for name, where in weight_map.items() if where == file]
                if not (folder / file).exists():
                    raise UserError(f"--model: {folder / file} is missing; it holds {expected[0]}")
                header = read_header(folder / file)
                for name in expected:
                    if name not in header:
                        raise UserError(f"--model: {name} should be in {folder / file} (says {INDEX}), and is not")
                self.entries |= header
        elif (folder / "model.safetensors").exists():
            self.entries = read_header(folder / "model.safetensors")
        else:
            raise UserError(f"--model: {folder} holds neither model.safetensors nor {INDEX}")
        self._stored = language_model_of(self.entries)
        self.entries = folded(self._stored)

    def read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        """A tensor, or rows [begin, end) of it; dequantised, if need be."""
        if name not in self._stored:
            return from_mxfp4(self._read(name + BLOCKS, begin, end), self._read(name + SCALES, begin, end))
        if name + INVERSE in self._stored:
            return from_fp8(self._read(name), self._read(name + INVERSE))[begin:end]
        return self._read(name, begin, end)

    def _read(self, name: str, begin: int | None = None, end: int | None = None) -> Tensor:
        file, key = self._stored[name].file, self._stored[name].key
        if file not in self._handles:  # kept: a large folder holds tens of thousands of tensors
            self._handles[file] = safe_open(file, framework="pt")
        handle = self._handles[file]
        return handle.get_tensor(key) if begin is None else handle.get_slice(key)[begin:end]

    def same(self, first: str, second: str) -> bool:
        return torch.equal(self.read(first), self.read(second))


def write_index(folder: Path, where: dict[str, str], num_bytes: int) -> None:
    """The index of a folder: which file holds each tensor."""
    index = {"metadata": {"total_size": num_bytes}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


class ShardWriter:
    """Writes tensors as they come, into files of about `limit` bytes; `where` says which file holds each."""

    def __init__(self, folder: Path, prefix: str, limit: int = SHARD_NUM_BYTES) -> None:
        self.folder, self.prefix, self.limit = folder, prefix, limit
        self.where: dict[str, str] = {}
        self.num_bytes = 0
        self._pending: dict[str, Tensor] = {}
        self._pending_num_bytes = 0
        self._files = 0
        self._failure: str | None = None

    def add(self, name: str, tensor: Tensor) -> None:
        if self._pending and self._pending_num_bytes + tensor.nbytes > self.limit:
            self.flush()
        # A copy: safetensors takes neither views of one storage nor tensors of a device.
        self._pending[name] = tensor.detach().to("cpu", copy=True).contiguous()
        self.num_bytes += tensor.nbytes
        self._pending_num_bytes += tensor.nbytes

    def flush(self) -> None:
        """Write what has come. A disk that does not take it is remembered: other ranks may be waiting for this one."""
        pending, self._pending, self._pending_num_bytes = self._pending, {}, 0
        if not pending or self._failure is not None:
            return
        self._files += 1
        file = f"{self.prefix}-{self._files:05d}.safetensors"
        try:
            save_file(pending, self.folder / file, metadata={"format": "pt"})
            with open(self.folder / file, "rb") as f:
                os.fsync(f.fileno())
        except (OSError, SafetensorError) as error:
            self._failure = f"--out: {self.folder / file} not written: {error}"
        self.where |= dict.fromkeys(pending, file)

    def close(self) -> None:
        """Write the rest. UserError where the disk did not take everything."""
        self.flush()
        if self._failure is not None:
            raise UserError(self._failure)
