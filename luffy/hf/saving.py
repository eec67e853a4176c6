"""Save: a parallel model to a folder that plain transformers opens, each rank writing its own experts.

Names are those of the library's checkpoints, experts one by one under their own numbers wherever re-homing has put
them. The folder gets its name when it is complete; nothing half-written is ever found under it.
"""

from __future__ import annotations

import contextlib
import copy
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click
import torch
from torch import Tensor, nn

from luffy.comm.sharding import whole
from luffy.errors import UserError
from luffy.hf.dense import whole_again
from luffy.hf.files import SHARD_NUM_BYTES, Checkpoint, ShardWriter, write_index
from luffy.hf.loading import sparse_blocks
from luffy.hf.model import ParallelModel
from luffy.hf.placing import Source, source_of
from luffy.hf.plain import check_all_saved, is_tied, plain_module, plain_tensors
from luffy.hf.verify import ask, judge, opened_again
from luffy.inputs import keep_apart
from luffy.model.moe_layer import MoELayer
from luffy.model.ownership import expert_parameters
from luffy.report.units import format_bytes
from luffy.train.checkpoint import everyone
from luffy.train.memory import free_host_memory

# More would keep the other ranks waiting for longer than they wait for each other.
MOST_VERIFIED_NUM_BYTES = 20_000_000_000

# Beside the weights and config.json: what a folder may hold of tokenizer and, the last, generation.
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
    verify: bool = True,
) -> Path:
    """Write `folder`, replacing what it held; all ranks call it and see the same files.

    verify: before the folder gets its name, open it in a fresh process of plain transformers on the first rank's
    machine, and compare the logits of one batch with those of `parallel`. UserError if they are others; what was
    written is then kept beside, as `FOLDER.unverified`.
    dtype: of the weights there, None: as in the folder that the model was loaded from, else as they are. PEFT adapters
    are merged into the weights that they adapt. UserError on every rank if one cannot write.
    """
    final, mesh = Path(folder), parallel.runtime.comm.mesh
    keep_apart(final, {"the folder that the model was loaded from,": parallel.folder})
    asked = ask(parallel) if verify else None
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
    dtype = dtype or parallel.stored_dtype
    everyone(mesh, lambda: _complete(parallel, temporary, dtype), only_first=True)
    if asked is not None:
        rounded = parallel.stream_dtype.itemsize < 4 or (dtype is not None and dtype.itemsize < 4)
        everyone(mesh, lambda: _verify(temporary, final, *asked, rounded), only_first=True)
    everyone(mesh, lambda: _publish(temporary, final), only_first=True)
    return final


def _verify(temporary: Path, final: Path, tokens: Tensor, logits: Tensor, rounded: bool) -> None:
    num_bytes = sum(p.stat().st_size for p in temporary.glob("*.safetensors"))
    # Plain transformers holds it in float32, on the host.
    if num_bytes > MOST_VERIFIED_NUM_BYTES or 2.5 * num_bytes > free_host_memory():
        click.echo(f"{final}: {format_bytes(num_bytes)} are too many to be opened again and compared here", err=True)
        return
    try:
        judge(final, logits, *opened_again(temporary, tokens), rounded)
    except UserError as error:
        kept = final.with_name(final.name + ".unverified")
        shutil.rmtree(kept, ignore_errors=True)
        temporary.rename(kept)
        raise UserError(f"{error}; it is kept as {kept}") from error


@contextlib.contextmanager
def _merged(parallel: ParallelModel) -> Iterator[None]:
    """Within, adapters (if any) are part of the weights that they adapt, which are whole on every rank.

    Afterwards those are what they were, to the bit: taking an adapter off again would leave its rounding behind.
    """
    library: Any = parallel.library
    if not hasattr(library, "merge_adapter"):
        yield
        return
    with whole_again(parallel):
        adapted = [m for m in library.modules() if hasattr(m, "base_layer") and hasattr(m, "merge")]
        weights = [p for m in adapted for p in m.base_layer.parameters(recurse=False)]
        before = [p.detach().to("cpu", copy=True) for p in weights]
        library.merge_adapter()
        try:
            yield
        finally:
            library.unmerge_adapter()
            with torch.no_grad():
                for p, value in zip(weights, before, strict=True):
                    p.copy_(value)


@torch.no_grad()
def _write(parallel: ParallelModel, writer: ShardWriter, dtype: torch.dtype | None) -> None:
    """This rank's part: its experts, and on the first rank all that is replicated."""
    mesh, blocks, experts = parallel.runtime.comm.mesh, sparse_blocks(parallel), expert_parameters(parallel)
    layer_of = {id(p): experts[name] for name, p in parallel.named_parameters() if name in experts}
    tensors = plain_tensors(parallel)
    check_all_saved(parallel, tensors)
    for name, tensor in tensors.items():
        source, layer = source_of(name, parallel.family, blocks, None), layer_of.get(id(tensor))
        value = whole(tensor) if layer is None else _with_adapter(layer, tensor)
        if isinstance(tensor, nn.Parameter) and dtype is not None:
            value = value.to(dtype)
        if layer is not None:
            _write_experts(parallel, layer, value, source, writer)
        elif mesh.rank == 0:
            writer.add(source.keys[0], value)
    writer.close()


def _with_adapter(layer: MoELayer, weight: Tensor) -> Tensor:
    """A stacked weight of experts; PEFT's own merging does not know those that are spread over ranks."""
    experts: Any = layer.experts
    return experts.merged(next(n for n, p in experts.named_parameters(recurse=False) if p is weight))


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


def _complete(parallel: ParallelModel, temporary: Path, dtype: torch.dtype | None) -> None:
    """Index, configuration and companions; every tensor accounted for."""
    lm, num_bytes = parallel.causal_lm, 0
    where: dict[str, str] = {}
    for part in sorted(temporary.glob("part-*.json")):
        names, size = json.loads(part.read_text(encoding="utf-8"))
        where |= names
        num_bytes += size
        part.unlink()
    write_index(temporary, where, num_bytes)
    check_complete(parallel, Checkpoint(temporary))
    for name in COMPANIONS if parallel.tokenizer is None else COMPANIONS[-1:]:
        if parallel.folder is not None and (parallel.folder / name).exists():
            shutil.copy(parallel.folder / name, temporary / name)
    if parallel.tokenizer is not None:
        shutil.copytree(parallel.tokenizer, temporary, dirs_exist_ok=True)
    config = copy.deepcopy(lm.config)
    config.dtype = dtype or config.dtype
    config.architectures = [type(lm).__name__]
    config.tie_word_embeddings = is_tied(parallel)  # not where they have been trained apart
    embedding: Any = plain_module(lm.get_input_embeddings())
    config.vocab_size = embedding.weight.shape[0]
    config.save_pretrained(temporary)


def _publish(temporary: Path, final: Path) -> None:
    """Give the folder its name."""
    old = final.with_name(final.name + ".old")
    shutil.rmtree(old, ignore_errors=True)
    if final.exists():
        final.rename(old)
    temporary.rename(final)
    shutil.rmtree(old, ignore_errors=True)


def check_complete(parallel: ParallelModel, checkpoint: Checkpoint) -> None:
    """RuntimeError if a tensor of the model is not in the folder, or one too many: a defect, found in time."""
    blocks, expected = sparse_blocks(parallel), set()
    for name in plain_tensors(parallel):
        source = source_of(name, parallel.family, blocks, None)
        experts = range(parallel.config.router.num_experts) if source.per_expert else [0]
        expected |= {key for e in experts for key in source.of(e)}
    odd = sorted(expected ^ set(checkpoint.entries))
    if odd:
        raise RuntimeError(f"export is not complete: {odd[0]} and {len(odd) - 1} more")
