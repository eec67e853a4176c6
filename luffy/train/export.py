"""The whole model in one `safetensors` file, experts in their own order whatever ranks held them: out, and in again."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from luffy.errors import UserError
from luffy.model import Transformer, expert_parameters


@torch.no_grad()
def export_safetensors(model: Transformer, path: Path) -> None:
    """Write all weights, float32, to `path` on rank 0; every rank of the first EP group takes part.

    Expert tensors are [E, ...], row e being expert e. The model's configuration is in the file's metadata under
    "luffy_config". One tensor at a time is gathered, so rank 0 holds the model once, not each rank.
    """
    mesh = model.runtime.comm.mesh
    tensors: dict[str, torch.Tensor] = {}
    buffers, experts = dict(model.named_buffers()), expert_parameters(model)
    for name, p in model.named_parameters():
        full = p.detach()
        if (layer := experts.get(name)) is not None:
            if mesh.ep_size > 1:
                parts = [torch.empty_like(full) for _ in range(mesh.ep_size)]
                dist.all_gather(parts, full.contiguous(), group=mesh.ep_group)
                full = torch.cat(parts)
            full = full[layer.slot_of_expert]
        if mesh.rank == 0:
            tensors[name] = full.cpu().contiguous()
    if mesh.rank == 0:
        for name, b in buffers.items():
            if name.endswith("choice_bias"):
                tensors[name] = b.detach().cpu().clone()
        temporary = path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata={"luffy_config": json.dumps(model.config.to_dict())})
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"--out: {path} not written: {error.strerror or error}") from error


@torch.no_grad()
def load_safetensors(model: Transformer, path: Path) -> None:
    """Begin from exported weights, at any number of ranks: each reads only its own experts.

    Raises UserError naming what is missing, left over or of another shape.
    """
    mesh, buffers = model.runtime.comm.mesh, dict(model.named_buffers())
    experts = expert_parameters(model)
    targets = dict(model.named_parameters()) | {n: b for n, b in buffers.items() if n.endswith("choice_bias")}
    try:
        with safe_open(path, framework="pt") as file:
            known = set(file.keys())
            wanted = {n for n in targets if not n.endswith("choice_bias") or n in known}
            if wanted != known:
                name = min(wanted ^ known)
                what = "lacks" if name in wanted else "holds, but this model lacks,"
                raise UserError(f"--start-weights {path}: it {what} {name}; give the model options it was trained with")
            for name in sorted(wanted):
                stored, target = file.get_slice(name), targets[name]
                shape = [*target.shape]
                if name in experts:
                    shape[0] *= mesh.ep_size
                if stored.get_shape() != shape:
                    raise UserError(
                        f"--start-weights {path}: {name} is {stored.get_shape()}, and {shape} in this model; give the "
                        "model options it was trained with"
                    )
                if name not in experts:
                    target.copy_(stored[:])
                    continue
                # Experts are stored by id; a fresh model has expert e in slot e.
                first = mesh.ep_rank * target.shape[0]
                target.copy_(stored[first : first + target.shape[0]])
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"--start-weights {path}: cannot be read ({error}); name a model.safetensors of --export"
        ) from error
