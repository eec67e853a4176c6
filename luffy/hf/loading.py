"""Load: a checkpoint folder to a parallel model, each rank reading its own experts, or rows, and no others.

The model is made without memory first (on torch's meta device), given its experts' share, and only then filled, tensor
by tensor from the files. Every tensor of the folder must find its place and every parameter its tensors: what is
missing, unused, or of another shape is an error that names it.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from luffy.comm import Comm, Mesh
from luffy.comm.mesh import mesh_of_world
from luffy.comm.sharding import is_sharded, local_part, rows_of
from luffy.errors import UserError
from luffy.hf.families import family_of
from luffy.hf.files import Checkpoint
from luffy.hf.hub import local_model
from luffy.hf.model import ParallelModel, parallelize
from luffy.hf.placing import Source, source_of
from luffy.hf.quantized import METHODS, method_of
from luffy.hf.vocabulary import of_vocabulary, with_mean_rows
from luffy.model.moe_layer import MoELayer
from luffy.model.ownership import check_model, expert_parameters
from luffy.model.router import wide
from luffy.recipes import Recipe
from luffy.train.checkpoint import everyone
from luffy.train.launch import join_world
from luffy.train.memory import Need


def read_config(folder: Path | str) -> Any:
    """The library's configuration of a folder; UserError where there is none that it knows.

    Of MXFP4 and fp8 weights, which are dequantised as they are read, it says nothing any more. Of a model that also
    sees it is the language model's.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    path = Path(folder) / "config.json"
    try:
        model_type = json.loads(path.read_text(encoding="utf-8")).get("model_type")
    except (OSError, ValueError) as error:
        raise UserError(
            f"--model: {path} cannot be read; name a folder that transformers' save_pretrained wrote"
        ) from error
    try:
        config = AutoConfig.from_pretrained(folder, local_files_only=True)
    except ValueError as error:
        raise UserError(f"--model: transformers does not know model_type {model_type!r} of {path}") from error
    language: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if language is not None and isinstance(getattr(config, "text_config", None), language.config_class):
        text, whole = config.text_config, config
        text.dtype = text.dtype or whole.dtype
        if (quantized := getattr(whole, "quantization_config", None)) is not None:
            text.quantization_config = quantized
        config = text
    if method_of(config) in METHODS:
        config.dequantized_from = method_of(config)
        del config.quantization_config
    return config


def load(
    folder: Path | str,
    mesh: Mesh | None = None,
    recipe: str | Recipe = "luffy",
    *,
    dtype: torch.dtype | None = None,
    vocab_size: int | None = None,
    **options: Any,
) -> ParallelModel:
    """The causal LM of `folder`, spread over `mesh`; every rank calls it, and all raise UserError if one cannot read.

    folder: or its name on the hub. mesh: None: all ranks that torchrun or accelerate launched, all one expert-parallel
    group. dtype: of the weights, None: as the folder says. vocab_size: if larger than the folder's, embedding and head
    get rows for new tokens, each the mean of the others. options: of `parallelize`.
    """
    from transformers import AutoModelForCausalLM

    mesh = mesh or mesh_of_world() or join_world()
    folder = Path(local_model(str(folder)))
    config = everyone(mesh, lambda: read_config(folder))
    if (method := vars(config).pop("dequantized_from", None)) is not None and mesh.rank == 0:
        click.echo(f"--model {folder}: its {method} weights are read as the numbers that they stand for", err=True)
    family = options.get("family") or family_of(config)
    grows = vocab_size is not None and vocab_size > config.vocab_size
    if grows:
        config.vocab_size = vocab_size
    stored = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype or stored)
    parallel = parallelize(model, mesh, recipe, **options | {"family": family})
    parallel.folder, parallel.stored_dtype = folder, stored
    weights = sum(local_part(p).nbytes for p in parallel.parameters())
    Need({f"for weights in {dtype or stored}": weights}).check(mesh.device, "--dtype or --dense sharded")
    _materialise(parallel, mesh.device)
    everyone(mesh, lambda: fill(parallel, Checkpoint(folder), grows))
    check_model(parallel, mesh)
    return parallel


def _materialise(parallel: ParallelModel, device: torch.device) -> None:
    """Give memory to what is on the meta device; weights tied to each other stay so."""
    lm = parallel.causal_lm
    for module in list(parallel.modules()):
        for name, child in list(module.named_children()):
            # Frequencies and the like are computed when a module is made, not read.
            computed = [child._buffers[n] for n in child._non_persistent_buffers_set]
            if any(b is not None and b.is_meta for b in computed):
                setattr(module, name, type(child)(config=lm.config).to(device))
    made: dict[int, Tensor] = {}

    def real(tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            return tensor.to(device)
        if id(tensor) not in made:
            empty = torch.empty_like(tensor, device=device)
            made[id(tensor)] = nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
        return made[id(tensor)]

    for module in parallel.modules():
        for store in (module._parameters, module._buffers):
            for name, tensor in store.items():
                if tensor is not None:
                    store[name] = real(tensor)  # type: ignore[assignment]


@torch.no_grad()
def fill(parallel: ParallelModel, checkpoint: Checkpoint, grows: bool = False) -> None:
    """Read every parameter and buffer of this rank. Raises UserError naming the tensor that does not fit.

    grows: the vocabulary may be larger than the checkpoint's.
    """
    lm, family, where = parallel.causal_lm, parallel.family, checkpoint.entries
    blocks = sparse_blocks(parallel)
    tied = tied_names(lm)
    used: set[str] = set()
    stacked, growing = expert_parameters(parallel), of_vocabulary(lm) if grows else set()
    own = {name: b for name, b in parallel.named_buffers() if is_stored(parallel, name)}
    for name, target in [*parallel.named_parameters(), *own.items()]:
        source = source_of(parallel.library_name(name), family, blocks, where)
        experts = range(parallel.config.router.num_experts) if source.per_expert else [0]
        keys = [key for e in experts for key in source.of(e)]
        for key in keys:
            if key not in where:
                raise UserError(f"--model: {key} is missing in {checkpoint.folder}{_alike(key, where)}")
        used.update(keys)
        if name in stacked:
            _fill_experts(target, source, checkpoint, parallel.runtime.comm.mesh.ep_rank)
        else:
            if name in own and target.dtype != (stored := checkpoint.read(keys[0]).dtype):
                target.data = target.data.to(wide(stored))  # a bias of the choice: see RouterBase
            _fill_one(target, keys[0], checkpoint, parallel.runtime.comm, id(target) in growing)
    ignored = [re.compile(p) for p in getattr(lm, "_keys_to_ignore_on_load_unexpected", None) or []]
    for key in where:
        if key in used or any(p.search(key) for p in ignored) or key.endswith("rotary_emb.inv_freq"):
            continue
        if key in tied and checkpoint.same(key, tied[key]):
            continue
        raise UserError(f"--model: {key} in {checkpoint.folder} belongs to nothing in a {lm.config.model_type} model")


def _fill_one(target: Tensor, key: str, checkpoint: Checkpoint, comm: Comm, grows: bool) -> None:
    """Of a tensor that is on every rank, or divided by rows. grows: it may have more rows than the checkpoint's."""
    if is_sharded(target) and not grows:
        _check_shape(key, checkpoint.entries[key].shape, target.shape)
        local_part(target).copy_(checkpoint.read(key, *rows_of(target, comm)))
        return
    value = checkpoint.read(key)
    value = with_mean_rows(value, target.shape[0]) if grows else value
    _check_shape(key, tuple(value.shape), target.shape)
    if is_sharded(target):
        begin, end = rows_of(target, comm)
        local_part(target).copy_(value[begin:end])
    else:
        target.copy_(value)


def _fill_experts(target: Tensor, source: Source, checkpoint: Checkpoint, ep_rank: int) -> None:
    """This rank's experts [n, ...]: of one stacked tensor, or of some tensors an expert."""
    first = ep_rank * target.shape[0]
    if not source.per_expert:
        (key,) = source.keys
        _check_shape(key, checkpoint.entries[key].shape[1:], target[0].shape)
        target.copy_(checkpoint.read(key, first, first + target.shape[0]))
        return
    for i in range(target.shape[0]):
        keys = source.of(first + i)
        for key, rows in zip(keys, target[i].split(target.shape[1] // len(keys)), strict=True):
            part = checkpoint.read(key)
            _check_shape(key, tuple(part.shape), rows.shape)
            rows.copy_(part)


def _check_shape(key: str, found: tuple[int, ...], wanted: torch.Size) -> None:
    if tuple(found) != tuple(wanted):
        raise UserError(f"--model: {key} is {list(found)}, and should be {list(wanted)}")


def _alike(key: str, where: dict[str, Any]) -> str:
    """A tensor that may be meant: of the same place but another last name."""
    stem = key.rsplit(".", 2)[0]
    near = next((k for k in where if k.startswith(stem + ".")), None)
    return "" if near is None else f" (there is {near})"


def sparse_blocks(parallel: ParallelModel) -> set[str]:
    """Library names of the blocks that have experts."""
    family = parallel.family
    return {
        f"model.layers.{i}.{family.block}"
        for i, layer in enumerate(parallel.layers)
        if isinstance(parallel.block(layer), MoELayer)
    }


def tied_names(lm: Any) -> dict[str, str]:
    """Parameters that are others under a second name, where the configuration ties them."""
    tied = getattr(lm, "_tied_weights_keys", None) or {}
    return dict(tied) if lm.config.tie_word_embeddings and isinstance(tied, dict) else {}


def is_stored(parallel: ParallelModel, name: str) -> bool:
    """Whether a buffer is the library's and in its checkpoints."""
    module, _, leaf = name.rpartition(".")
    owner = parallel.get_submodule(module)
    return leaf not in owner._non_persistent_buffers_set and not isinstance(owner, MoELayer)
