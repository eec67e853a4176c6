"""Keep a model of one's own that holds `luffy.MoEBlock`s, and continue from it at any number of ranks.

    luffy.save_checkpoint(folder, model, optimizer)      luffy.load_checkpoint(folder, model, optimizer)
    luffy.save_weights(path, model)                      luffy.load_weights(path, model)

A checkpoint goes through torch.distributed.checkpoint, weights through safetensors. Every rank calls either. A rank's
`state_dict()` holds its own experts only, and other ranks refuse it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor, Replicate, Shard

from luffy.errors import UserError
from luffy.model import expert_parameters
from luffy.train.checkpoint import disk_error, everyone, prepare_optimizer
from luffy.train.export import export_safetensors, load_safetensors, mesh_of


def sharded_state(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[str, Any]:
    """Weights, buffers and the optimizer's state as a flat dict for torch.distributed.checkpoint, sharing memory.

    Experts are DTensors over the expert-parallel mesh, so that they can be read at another number of ranks.
    """
    mesh, experts = mesh_of(model), expert_parameters(model)

    def describe(name: str, tensor: Tensor) -> Any:
        if name not in experts or tensor.dim() == 0:
            return tensor.detach()
        return DTensor.from_local(tensor.detach(), mesh.device_mesh, (Replicate(), Shard(0)), run_check=False)

    state: dict[str, Any] = {f"model.{n}": describe(n, p) for n, p in model.named_parameters()}
    for prefix, module in model.named_modules():
        for name, b in module._buffers.items():
            if b is not None and name not in module._non_persistent_buffers_set:
                state[f"model.{prefix}.{name}"] = b.detach()
    for name, p in model.named_parameters() if optimizer is not None else ():
        for key, value in optimizer.state.get(p, {}).items():  # type: ignore[union-attr]
            if isinstance(value, Tensor):
                state[f"optimizer.{name}.{key}"] = describe(name, value)
    return state


def save_checkpoint(folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write `folder`, which all ranks must see: weights, buffers, and the optimizer's tensors.

    UserError on every rank where it is no new or empty folder, or the disk refuses.
    """

    def refuse() -> None:
        there = Path(folder)
        if there.exists() and (not there.is_dir() or any(there.iterdir())):
            what = "not empty" if there.is_dir() else "a file"
            raise UserError(f"save_checkpoint: {folder} is {what}; name a new folder")

    def write() -> None:
        try:
            dcp.save(sharded_state(model, optimizer), checkpoint_id=str(folder))
        except (Exception, CheckpointException) as error:
            if (reason := disk_error(error)) is None:
                raise
            raise UserError(f"save_checkpoint: {folder} not written: {reason}") from error

    mesh = mesh_of(model)
    everyone(mesh, refuse, only_first=True)
    everyone(mesh, write)


def load_checkpoint(folder: Path | str, model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Read a checkpoint into `model` and `optimizer` (AdamW, or another that has made its state), at any number of
    ranks. UserError on every rank where it does not fit."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW):
        prepare_optimizer(optimizer)
    state = sharded_state(model, optimizer)

    def read() -> None:
        try:
            dcp.load(state, checkpoint_id=str(folder))
        except (Exception, CheckpointException) as error:
            lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
            raise UserError(f"load_checkpoint: {folder} does not fit this model: {lines[-1][:300]}") from error

    everyone(mesh_of(model), read)


def save_weights(path: Path | str, model: nn.Module) -> None:
    """All weights in one safetensors file, experts whole and in the order of their numbers.

    UserError on every rank where it cannot be written.
    """
    everyone(mesh_of(model), lambda: export_safetensors(model, path, "save_weights"))


def load_weights(path: Path | str, model: nn.Module) -> None:
    """Weights from a file of `save_weights`, at any number of ranks. UserError on every rank where they do not fit."""
    everyone(mesh_of(model), lambda: load_safetensors(model, path, "load_weights"))
