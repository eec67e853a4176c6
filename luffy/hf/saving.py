"""Save: a parallel model to a folder that plain transformers opens, each rank writing its own experts.

Names are those of the library's checkpoints, experts one by one under their own numbers wherever re-homing has put
them. The folder gets its name when it is complete; nothing half-written is ever found under it.
"""

from __future__ import annotations

import contextlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luffy.comm.sharding import whole
from luffy.errors import UserError
from luffy.hf.dense import whole_again
from luffy.hf.files import SHARD_NUM_BYTES, Checkpoint, ShardWriter, write_index
from luffy.hf.loading import is_stored, sparse_blocks, tied_names
from luffy.hf.model import ParallelModel
from luffy.hf.placing import Source, source_of
from luffy.model.moe_layer import MoELayer
from luffy.model.ownership import expert_parameters
from luffy.train.checkpoint import everyone

# Beside the weights and config.json: what a folder may hold of tokenizer and generation.
COMPANIONS = (
    "tokenizer.json", "tokenizer_config.json", "tokenizer.model", "special_tokens_map.json", "added_tokens.json",
    "vocab.json", "merges.txt", "vocab.txt", "chat_template.jinja", "chat_template.json", "generation_config.json",
)  # fmt: skip


def save_pretrained(
    parallel: ParallelModel,
    folder: Path | str,
    *,
    dtype: torch.dtype | None = None,
    shard_num_bytes: int = SHARD_NUM_BYTES,
) -> Path:
    """Write `folder`, replacing what it held; all ranks call it and see the same files.

    dtype: of the weights there, None: as in the folder that the model was loaded from, else as they are. PEFT adapters
    are merged into the weights that they adapt. UserError on every rank if one cannot write.
    """
    final, mesh = Path(folder), parallel.runtime.comm.mesh
    temporary = final.with_name(final.name + ".tmp")

    def begin() -> None:
        try:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        except OSError as error:
            raise UserError(f"--out: {temporary} cannot be made: {error.strerror}") from error

    everyone(mesh, begin, only_first=True)
    writer = ShardWriter(temporary, f"model-rank{mesh.ep_rank:03d}", shard_num_bytes)
    try:
        with _merged(parallel):
            everyone(mesh, lambda: _write(parallel, writer, dtype or parallel.stored_dtype))
    except UserError:
        if mesh.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        raise

    def announce() -> None:
        if mesh.dp_rank == 0:
            part = temporary / f"part-{mesh.ep_rank:03d}.json"
            part.write_text(json.dumps([writer.where, writer.num_bytes]), encoding="utf-8")

    everyone(mesh, announce)
    everyone(mesh, lambda: _publish(parallel, temporary, final, dtype or parallel.stored_dtype), only_first=True)
    return final


@contextlib.contextmanager
def _merged(parallel: ParallelModel) -> Iterator[None]:
    """Within, adapters (if any) are part of the weights that they adapt, which are whole on every rank."""
    library: Any = parallel.library
    if not hasattr(library, "merge_adapter"):
        yield
        return
    with whole_again(parallel):
        library.merge_adapter()
        try:
            yield
        finally:
            library.unmerge_adapter()


@torch.no_grad()
def _write(parallel: ParallelModel, writer: ShardWriter, dtype: torch.dtype | None) -> None:
    """This rank's part: its experts, and on the first rank all that is replicated."""
    mesh, blocks, layers = parallel.runtime.comm.mesh, sparse_blocks(parallel), expert_parameters(parallel)
    for name, p in parallel.named_parameters():
        library = parallel.library_name(name)
        if ".lora_" in library:
            continue
        source = source_of(library, parallel.family, blocks, None)
        value = _with_adapter(parallel, name) if name in layers else whole(p)
        value = value if dtype is None else value.to(dtype)
        if name in layers:
            _write_experts(parallel, layers[name], value, source, writer)
        elif mesh.rank == 0:
            writer.add(source.keys[0], value)
    for name, b in parallel.named_buffers():
        if mesh.rank == 0 and is_stored(parallel, name):
            writer.add(source_of(parallel.library_name(name), parallel.family, blocks, None).keys[0], b)
    writer.close()


def _with_adapter(parallel: ParallelModel, name: str) -> Tensor:
    """A stacked weight of experts; PEFT's own merging does not know those that are spread over ranks."""
    module, _, leaf = name.rpartition(".")
    experts: Any = parallel.get_submodule(module)
    return experts.merged(leaf)


def _write_experts(parallel: ParallelModel, moe: MoELayer, value: Tensor, source: Source, writer: ShardWriter) -> None:
    comm = parallel.runtime.comm
    n, slots = value.shape[0], moe.slot_of_expert.tolist()
    if not source.per_expert:  # stacked on disk: the first rank writes a layer at a time
        whole = comm.all_gather_ep(value).flatten(0, 1)[moe.slot_of_expert]
        if comm.mesh.rank == 0:
            writer.add(source.keys[0], whole)
        return
    if comm.mesh.dp_rank != 0:
        return
    for expert, slot in enumerate(slots):
        if slot // n == comm.mesh.ep_rank:
            keys, one = source.of(expert), value[slot % n]
            for key, part in zip(keys, one.split(one.shape[0] // len(keys)), strict=True):
                writer.add(key, part)


def _publish(parallel: ParallelModel, temporary: Path, final: Path, dtype: torch.dtype | None) -> None:
    """Index, configuration and companions; every tensor accounted for; then the name."""
    lm, num_bytes = parallel.causal_lm, 0
    where: dict[str, str] = {}
    for part in sorted(temporary.glob("part-*.json")):
        names, size = json.loads(part.read_text(encoding="utf-8"))
        where |= names
        num_bytes += size
        part.unlink()
    write_index(temporary, where, num_bytes)
    check_complete(parallel, Checkpoint(temporary))
    for name in COMPANIONS:
        if parallel.folder is not None and (parallel.folder / name).exists():
            shutil.copy(parallel.folder / name, temporary / name)
    before = lm.config.dtype
    lm.config.dtype = dtype or lm.config.dtype
    lm.config.architectures = [type(lm).__name__]
    lm.config.save_pretrained(temporary)
    lm.config.dtype = before
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def check_complete(parallel: ParallelModel, checkpoint: Checkpoint) -> None:
    """RuntimeError if a tensor of the model is not in the folder, or one too many: a defect, found in time."""
    blocks, expected = sparse_blocks(parallel), set()
    tied = tied_names(parallel.causal_lm)
    stored = [n for n, _ in parallel.named_buffers() if is_stored(parallel, n)]
    for name in [n for n, _ in parallel.named_parameters()] + stored:
        library = parallel.library_name(name)
        if ".lora_" in library:
            continue
        source = source_of(library, parallel.family, blocks, None)
        experts = range(parallel.config.router.num_experts) if source.per_expert else [0]
        expected |= {key for e in experts for key in source.of(e)}
    odd = sorted((expected - set(tied)) ^ set(checkpoint.entries))
    if odd:
        raise RuntimeError(f"export is not complete: {odd[0]} and {len(odd) - 1} more")
