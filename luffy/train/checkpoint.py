"""Checkpoints: written whole or not at all, kept N deep, readable at another number of ranks.

Tensors go through `torch.distributed.checkpoint`. Experts and their optimizer state are described to it as shards of
one tensor over the expert-parallel mesh; sharded weights (luffy.comm.sharding) are shards of one over the world as they
are. So it can hand them to any other number of ranks, sharded or not. A checkpoint is written beside its final name,
its files' sizes and checksums are recorded, and only then does it get that name; a kill or a full disk at any moment
leaves the previous one as it was.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import traceback
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: `except Exception` misses it
from torch.distributed.tensor import DTensor, Replicate, Shard

from luffy.comm import Mesh
from luffy.errors import UserError
from luffy.model import Transformer, expert_parameters

FORMAT_VERSION = 1
PARTS = "parts.safetensors"
_NAME = re.compile(r"step-(\d{8})$")


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first. What a killed run left half-written has another name."""
    return sorted(p for p in folder.glob("step-*") if _NAME.match(p.name) and (p / "meta.json").exists())


def training_state(
    model: Transformer, optimizer: torch.optim.Optimizer, memory: tuple[Tensor, ...] | None
) -> dict[str, Any]:
    """Everything that training continues from, as a flat dict of tensors (what ranks share as DTensors)."""
    mesh = model.runtime.comm.mesh.device_mesh
    expert_layout = (Replicate(), Shard(0))
    experts = expert_parameters(model)

    def describe(name: str, tensor: Tensor) -> Any:
        if name in experts and tensor.dim() > 0:
            return DTensor.from_local(tensor.detach(), mesh, expert_layout, run_check=False)
        return tensor.detach()

    state: dict[str, Any] = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = describe(name, p)
        for key, value in optimizer.state[p].items():
            state[f"optimizer.{name}.{key}"] = describe(name, value)
    for name, b in model.named_buffers():
        state[f"model.{name}"] = b.detach()
    for i, m in enumerate(memory or ()):
        state[f"memory.{i}"] = DTensor.from_local(m, mesh, (Shard(0), Shard(0)), run_check=False)
    return state


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would make, so that there is something to load into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group.get("fused") else "cpu")
                optimizer.state[p] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def everyone(mesh: Mesh, action: Callable[[], Any], only_first: bool = False) -> Any:
    """Run `action` (on rank 0 alone, or on all) and let every rank raise if one of them failed."""
    outcome: list[Any] = [None, None]
    if mesh.rank == 0 or not only_first:
        try:
            outcome[0] = action()
        except UserError as error:
            outcome[1] = str(error)
    if only_first:
        dist.broadcast_object_list(outcome, src=0)
        errors = [outcome[1]]
    else:
        errors = [None] * mesh.world_size
        dist.all_gather_object(errors, outcome[1])
    for message in errors:
        if message is not None:
            raise UserError(message)
    return outcome[0]


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def save_checkpoint(
    folder: Path,
    step: int,
    state: dict[str, Any],
    meta: dict[str, Any],
    mesh: Mesh,
    keep: int,
    tensors: dict[str, Tensor] | None = None,
) -> Path:
    """Write `folder/step-XXXXXXXX` and drop all but the newest `keep`. tensors: of parts (luffy.train.parts.saving).

    All ranks call it; the folder must be the same file system for all of them. Raises UserError (on every rank) when
    the disk is full or not writable; earlier checkpoints are untouched then.
    """
    final = folder / f"step-{step:08d}"
    temporary = folder / f"{final.name}.tmp"

    def clear() -> None:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for leftover in folder.glob("step-*.tmp"):
                shutil.rmtree(leftover)
        except OSError as error:
            raise UserError(f"--out: cannot write checkpoints to {folder}: {error.strerror}") from error

    def write() -> None:
        try:
            with _quiet():
                dcp.save(state, checkpoint_id=str(temporary))
        except (Exception, CheckpointException) as error:
            reason = _disk_error(error)
            if reason is None:
                raise
            shutil.rmtree(temporary, ignore_errors=True)
            raise UserError(f"--out: checkpoint of step {step} not written to {folder}: {reason}") from error

    def publish() -> None:
        try:
            if tensors:
                save_file(tensors, temporary / PARTS)
            files = {p.name: _fingerprint(p) for p in sorted(temporary.iterdir())}
            text = json.dumps({"format": FORMAT_VERSION, "step": step, "files": files, **meta}, indent=1)
            with open(temporary / "meta.json", "w", encoding="utf-8") as f:
                f.write(text)
                f.flush()
                os.fsync(f.fileno())
            if final.exists():
                shutil.rmtree(final)
            temporary.rename(final)
            for old in list_checkpoints(folder)[:-keep]:
                shutil.rmtree(old)
        except OSError as error:
            raise UserError(f"--out: checkpoint of step {step} not written: {error.strerror}") from error

    everyone(mesh, clear, only_first=True)
    everyone(mesh, write)
    everyone(mesh, publish, only_first=True)
    return final


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint's description; raises UserError when it is damaged or of another version."""
    try:
        meta = json.loads((path / "meta.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise _damaged(path, "meta.json cannot be read") from error
    if meta.get("format") != FORMAT_VERSION:
        raise UserError(f"--resume: {path} was written by another version of luffy (format {meta.get('format')})")
    return meta


def verify(path: Path) -> dict[str, Any]:
    """`read_meta`, after comparing every file with its recorded size and checksum."""
    meta = read_meta(path)
    for name, expected in meta["files"].items():
        if not (path / name).exists():
            raise _damaged(path, f"{name} is missing")
        if _fingerprint(path / name) != expected:
            raise _damaged(path, f"{name} is not what was written")
    return meta


def load_checkpoint(path: Path, state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Verify `path` and load it into the tensors of `state`, in place; returns its meta.

    Raises UserError on every rank when it is damaged or does not fit the model.
    """
    meta = everyone(mesh, lambda: verify(path), only_first=True)

    def read() -> None:
        try:
            with _quiet():
                dcp.load(state, checkpoint_id=str(path))
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"--resume: {path} does not fit this model and these options: {_last_line(error)}"
            ) from error

    everyone(mesh, read)
    return meta


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"--resume: checkpoint {path} is damaged ({what}); delete it to resume from the one before")


def _fingerprint(path: Path) -> list[int]:
    """[size, crc32] of a file, read in pieces."""
    size = crc = 0
    with open(path, "rb") as f:
        while block := f.read(1 << 22):
            size, crc = size + len(block), zlib.crc32(block, crc)
    return [size, crc]


def _disk_error(error: BaseException) -> str | None:
    """The system's words if a disk is behind this error, however deeply it is wrapped."""
    text = "".join(traceback.format_exception(error))
    for reason in (
        "No space left on device",
        "Disk quota exceeded",
        "Permission denied",
        "Read-only file system",
    ):
        if reason in text:
            return reason
    # torch's own writer reports a short write without the system's reason.
    return "the disk is full" if "unexpected pos" in text or "PytorchStreamWriter failed" in text else None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
