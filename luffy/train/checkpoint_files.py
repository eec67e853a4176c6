"""The files of a checkpoint: written by torch.distributed.checkpoint, described in JSON, read without pickle.

torch's own description of a checkpoint (`.metadata`) is a pickle, which can run code when it is read. Here it is JSON:

    meta.json          what the run continues from; size and CRC-32 of every other file; a CRC-32 of itself
    tensors.json       torch's description: types, shapes, and where each piece of a tensor lies
    parts.safetensors  what parts of the run have learnt (luffy.train.parts), whole
    __R_N.distcp       the pieces that rank R wrote, read by torch.load(weights_only=True)

Each rank computes the checksums of its own files, as it writes them. The first rank then writes the two descriptions
and gives the folder its name.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.tensor import DTensor
from torch.futures import Future

META, TENSORS, PARTS = "meta.json", "tensors.json", "parts.safetensors"
FORMAT_VERSION = 2
_NAME = re.compile(r"step-(\d{8})$")
_FILE = "file:"  # marks the result that carries a file's checksum among those that carry pieces
_DTYPES = {str(d): d for d in vars(torch).values() if isinstance(d, torch.dtype)}


class DamagedError(Exception):
    """A file is not what was written; the text says which and how."""


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What a killed run left half-written has another name."""
    return sorted(p for p in folder.glob("step-*") if _NAME.match(p.name) and (p / META).exists())


def fingerprint(path: Path) -> list[int]:
    """[size, crc32] of a file, read in pieces."""
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def write_synced(path: Path, text: str) -> None:
    with open(path, "w", encoding="utf-8") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())


def sync_folder(path: Path) -> None:
    """Put a folder's names on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _canonical(content: dict[str, Any]) -> str:
    return json.dumps(content, sort_keys=True, separators=(",", ":"))


def dump_meta(content: dict[str, Any]) -> str:
    """The text of meta.json."""
    plain = json.loads(json.dumps(content))
    return json.dumps({"crc32": zlib.crc32(_canonical(plain).encode()), "content": plain}, indent=1)


def read_meta(folder: Path) -> dict[str, Any]:
    """The content of meta.json. Raises DamagedError; a version other than FORMAT_VERSION is the caller's matter."""
    try:
        text = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DamagedError(f"{META} cannot be read") from error
    if isinstance(text, dict) and "format" in text:  # of version 1, which had no checksum
        return text
    content = text.get("content") if isinstance(text, dict) else None
    if not isinstance(content, dict) or text.get("crc32") != zlib.crc32(_canonical(content).encode()):
        raise DamagedError(f"{META} is not what was written")
    return content


def check_files(folder: Path, files: dict[str, Any], part: int = 0, parts: int = 1) -> None:
    """Compare every `parts`-th file, from `part` on, with its recorded size and checksum. Raises DamagedError."""
    for name, expected in sorted(files.items())[part::parts]:
        if os.sep in name or not (folder / name).is_file():
            raise DamagedError(f"{name} is missing")
        if fingerprint(folder / name) != expected:
            raise DamagedError(f"{name} is not what was written")


class Writer(FileSystemWriter):
    """Writes `final`, by way of `final`.tmp; called on every rank, from whatever thread saves.

    meta: what meta.json holds beside the files. keep: complete checkpoints to leave in the folder, this one included.
    tensors: to be written whole, by the first rank, to PARTS.
    """

    def __init__(self, final: Path, meta: dict[str, Any], keep: int, tensors: dict[str, Tensor] | None = None) -> None:
        self.tensors = tensors or {}
        self.final, self.temporary, self.meta, self.keep = final, final.with_name(f"{final.name}.tmp"), meta, keep
        super().__init__(str(self.temporary))

    def stage(self, state_dict: dict[str, Any]) -> dict[str, Any]:
        """A copy of the state in the host's memory, to be written while training goes on."""
        self.per_thread_copy_ahead = 0  # it is on the CPU already
        return {name: _copied(tensor) for name, tensor in state_dict.items()}

    def write_data(self, plan: Any, planner: Any) -> Future[list[WriteResult]]:
        results = list(super().write_data(plan, planner).wait())
        for name in sorted({r.storage_data.relative_path for r in results}):
            mark = fingerprint(self.temporary / name)
            results.append(WriteResult(MetadataIndex(_FILE + name), mark[0], mark))
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On the first rank, once all have written: describe the files and give the folder its name."""
        every = [r for of_rank in results for r in of_rank]
        files = {r.index.fqn.removeprefix(_FILE): r.storage_data for r in every if r.index.fqn.startswith(_FILE)}
        pieces = [r for r in every if not r.index.fqn.startswith(_FILE)]
        write_synced(self.temporary / TENSORS, json.dumps(_describe(metadata, pieces)))
        files[TENSORS] = fingerprint(self.temporary / TENSORS)
        if self.tensors:
            save_file(self.tensors, self.temporary / PARTS)
            files[PARTS] = fingerprint(self.temporary / PARTS)
        write_synced(self.temporary / META, dump_meta(self.meta | {"format": FORMAT_VERSION, "files": files}))
        sync_folder(self.temporary)
        if self.final.exists():
            shutil.rmtree(self.final)
        self.temporary.rename(self.final)
        sync_folder(self.final.parent)
        others = [c for c in list_checkpoints(self.final.parent) if c != self.final]
        for old in others[: max(0, len(others) - self.keep + 1)]:
            shutil.rmtree(old, ignore_errors=True)


def _copied(tensor: torch.Tensor) -> torch.Tensor:
    """torch's own way of staging, without its deep copy, which fails for some DTensors (torch 2.13)."""
    if not isinstance(tensor, DTensor):
        return tensor.detach().to("cpu", copy=True)
    twin: Any = tensor.detach()
    twin._local_tensor = tensor.to_local().detach().to("cpu", copy=True)
    return twin


def _describe(metadata: Metadata, pieces: list[WriteResult]) -> dict[str, Any]:
    tensors = {}
    for name, about in metadata.state_dict_metadata.items():
        assert isinstance(about, TensorStorageMetadata), f"{name} is no tensor"
        chunks = [[list(c.offsets), list(c.sizes)] for c in about.chunks]
        tensors[name] = {"dtype": str(about.properties.dtype), "size": list(about.size), "chunks": chunks}
    places = []
    for r in pieces:
        offset = None if r.index.offset is None else list(r.index.offset)
        s = r.storage_data
        places.append([r.index.fqn, offset, r.index.index, s.relative_path, s.offset, s.length])
    return {"tensors": tensors, "places": places}


class Reader(FileSystemReader):
    """Reads a checkpoint by its tensors.json."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """Raises DamagedError where the description has another shape or leads out of the folder."""
        folder = Path(self.path)
        try:
            text = json.loads((folder / TENSORS).read_text(encoding="utf-8"))
            tensors: dict[str, Any] = {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=_DTYPES[about["dtype"]]),
                    torch.Size(about["size"]),
                    [ChunkStorageMetadata(torch.Size(o), torch.Size(s)) for o, s in about["chunks"]],
                )
                for name, about in text["tensors"].items()
            }
            places = {
                MetadataIndex(name, offset, index): _StorageInfo(_inside(file), begin, length)
                for name, offset, index, file, begin, length in text["places"]
            }
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise DamagedError(f"{TENSORS} cannot be read") from error
        return Metadata(tensors, storage_data=places, storage_meta=StorageMeta(load_id=self.load_id))


def _inside(file: str) -> str:
    if Path(file).name != file or file == "..":
        raise ValueError(f"{file} is not in the folder")
    return file
