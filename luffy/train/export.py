"""The whole model in one `safetensors` file, experts in their own order whatever ranks held them: out, and in again.

For `luffy.model.Transformer` and for any module of one's own that holds `luffy.MoEBlock`s.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from luffy.comm import Mesh
from luffy.errors import UserError
from luffy.model import MoELayer, expert_parameters


def mesh_of(model: nn.Module) -> Mesh:
    """The mesh that a model's experts are spread over; UserError for one without any."""
    for module in model.modules():
        if isinstance(module, MoELayer):
            return module.runtime.comm.mesh
    raise UserError(f"{type(model).__name__} holds no luffy.MoEBlock: save it as any other model")


def stored_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Buffers that belong to the model, whatever ranks there are: not where experts live."""
    return {
        f"{prefix}.{name}" if prefix else name: b
        for prefix, module in model.named_modules()
        if not isinstance(module, MoELayer)
        for name, b in module._buffers.items()
        if b is not None and name not in module._non_persistent_buffers_set
    }


@torch.no_grad()
def export_safetensors(model: nn.Module, path: Path | str, option: str = "--out") -> None:
    """Write all weights as they are to `path` on rank 0; every rank takes part.

    Expert tensors are [E, ...], row e being expert e. The configuration of a `Transformer` is in the file's metadata
    under "luffy_config". One tensor at a time is gathered, so rank 0 holds the model once, not each rank.
    option: for messages. Raises UserError on rank 0 where `path` cannot be written.
    """
    mesh, path = mesh_of(model), Path(path)
    tensors: dict[str, Tensor] = {}
    experts = expert_parameters(model)
    for name, p in model.named_parameters():
        full = p.full_tensor().detach() if isinstance(p, DTensor) else p.detach()
        if (layer := experts.get(name)) is not None:
            if mesh.ep_size > 1:
                parts = [torch.empty_like(full) for _ in range(mesh.ep_size)]
                dist.all_gather(parts, full.contiguous(), group=mesh.ep_group)
                full = torch.cat(parts)
            full = full[layer.slot_of_expert]
        if mesh.writes:
            tensors[name] = full.to("cpu", copy=True).contiguous()
    if mesh.writes:
        tensors |= {name: b.detach().to("cpu", copy=True) for name, b in stored_buffers(model).items()}
        config = getattr(model, "config", None)
        to_dict = getattr(config, "to_dict", None)
        metadata = {"luffy_config": json.dumps(to_dict())} if to_dict is not None else None
        temporary = path.with_suffix(".tmp")
        try:
            save_file(tensors, temporary, metadata=metadata)
            os.replace(temporary, path)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            reason = getattr(error, "strerror", None) or error
            raise UserError(f"{option}: {path} not written: {reason}") from error


@torch.no_grad()
def load_safetensors(model: nn.Module, path: Path | str, option: str = "--start-weights") -> None:
    """Begin from exported weights, at any number of ranks: each reads only its own experts. All ranks call it.

    option: for messages. Raises UserError naming what is missing, left over or of another shape.
    """
    mesh, buffers, experts = mesh_of(model), stored_buffers(model), expert_parameters(model)
    targets = dict(model.named_parameters()) | buffers
    try:
        with safe_open(path, framework="pt") as file:
            known = set(file.keys())
            # A bias of the choice that was never used need not be there.
            wanted = {n for n in targets if not n.endswith("choice_bias") or n in known}
            if wanted != known:
                name = min(wanted ^ known)
                what = "lacks" if name in wanted else "holds, but this model lacks,"
                raise UserError(f"{option} {path}: it {what} {name}; give the model options it was trained with")
            for name in sorted(wanted):
                stored, target, layer = file.get_slice(name), targets[name], experts.get(name)
                shape = [*target.shape]
                if layer is not None:
                    shape[0] *= mesh.ep_size
                if stored.get_shape() != shape:
                    raise UserError(
                        f"{option} {path}: {name} is {stored.get_shape()}, and {shape} in this model; give the "
                        "model options it was trained with"
                    )
                if isinstance(target, DTensor):
                    whole = stored[:].to(target.device, target.dtype)
                    target.copy_(distribute_tensor(whole, target.device_mesh, target.placements, src_data_rank=None))
                    continue
                if layer is None:
                    target.copy_(stored[:] if shape else file.get_tensor(name))
                    continue
                first = mesh.ep_rank * target.shape[0]  # experts are stored by id, and live by slot
                ids = torch.argsort(layer.slot_of_expert)[first : first + target.shape[0]].tolist()
                for row, expert in zip(target, ids, strict=True):
                    row.copy_(stored[expert : expert + 1][0])
    except (OSError, SafetensorError) as error:
        raise UserError(f"{option} {path}: cannot be read ({error}); name a file that luffy exported") from error
