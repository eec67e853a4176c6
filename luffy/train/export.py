"""Export: the whole model in one `safetensors` file, experts in their own order whatever ranks held them."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file

from luffy.errors import UserError
from luffy.model import Transformer, is_expert


@torch.no_grad()
def export_safetensors(model: Transformer, path: Path) -> None:
    """Write all weights, float32, to `path` on rank 0; every rank of the first EP group takes part.

    Expert tensors are [E, ...], row e being expert e. The model's configuration is in the file's metadata under
    "luffy_config". One tensor at a time is gathered, so rank 0 holds the model once, not each rank.
    """
    mesh = model.runtime.comm.mesh
    tensors: dict[str, torch.Tensor] = {}
    buffers = dict(model.named_buffers())
    for name, p in model.named_parameters():
        full = p.detach()
        if is_expert(name):
            if mesh.ep_size > 1:
                parts = [torch.empty_like(full) for _ in range(mesh.ep_size)]
                dist.all_gather(parts, full.contiguous(), group=mesh.ep_group)
                full = torch.cat(parts)
            slot = buffers[name.split(".experts.")[0] + ".slot_of_expert"]
            full = full[slot]
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
