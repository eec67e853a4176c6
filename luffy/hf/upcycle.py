"""Upcycling (arXiv 2212.05055): a dense model becomes a Mixture-of-Experts with copies of its feed-forward as experts.

Llama becomes Mixtral, Qwen3 becomes Qwen3-MoE. All experts of a layer are alike at first and the weights of a token's
experts sum to one, so the new model computes what the old one did; its routers start as small noise and learn. Tensors
are read and written one at a time.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import click
import torch

from luffy.errors import UserError
from luffy.hf.families import FAMILIES
from luffy.hf.files import INDEX, Checkpoint, ShardWriter, write_index
from luffy.hf.loading import read_config
from luffy.hf.saving import COMPANIONS
from luffy.inputs import keep_apart
from luffy.ranges import AT_LEAST_ONE, NOT_NEGATIVE, SEED

# Settings that mean the same in both configurations.
_KEPT = (
    "vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache", "rope_parameters",
    "attention_bias", "attention_dropout", "tie_word_embeddings", "pad_token_id", "bos_token_id", "eos_token_id",
    "intermediate_size", "dtype",
)  # fmt: skip


def moe_config(dense: Any, experts: int, top_k: int) -> Any:
    """The configuration of the new model; UserError for a dense one that has no such counterpart."""
    from transformers import MixtralConfig, Qwen3MoeConfig

    kept = {name: getattr(dense, name) for name in _KEPT if getattr(dense, name, None) is not None}
    if dense.model_type == "llama":
        for option in ("attention_bias", "mlp_bias"):
            if getattr(dense, option, False):
                raise UserError(f"--model: Mixtral has no biases, and this Llama has ({option})")
        kept.pop("attention_bias", None)
        return MixtralConfig(
            **kept, num_local_experts=experts, num_experts_per_tok=top_k, sliding_window=None, output_router_logits=True
        )
    if dense.model_type == "qwen3":
        if getattr(dense, "use_sliding_window", False):
            raise UserError("--model: use_sliding_window by layers has no counterpart in Qwen3-MoE")
        return Qwen3MoeConfig(
            **kept, num_experts=experts, num_experts_per_tok=top_k, moe_intermediate_size=dense.intermediate_size,
            norm_topk_prob=True, decoder_sparse_step=1, mlp_only_layers=[], output_router_logits=True,
        )  # fmt: skip
    raise UserError(f"--model: model_type {dense.model_type!r} cannot be upcycled; llama and qwen3 can")


def upcycle(
    model: Path,
    out: Path,
    experts: int = 8,
    top_k: int = 2,
    noise: float = 0.02,
    seed: int = 0,
    overwrite: bool = False,
) -> None:
    """Write `out`, which must not exist unless `overwrite`. noise: standard deviation of the routers' weights."""
    AT_LEAST_ONE.check("--experts", experts)
    AT_LEAST_ONE.check("--top-k", top_k)
    if top_k > experts:
        raise UserError(f"--top-k {top_k}: give a whole number from 1 to --experts, {experts}")
    NOT_NEGATIVE.check("--noise", noise)
    SEED.check("--seed", seed)
    keep_apart(out, {"--model": model})
    if out.exists() and not overwrite:
        raise UserError(f"--out {out} exists; choose another folder or add --overwrite")
    dense, source = read_config(model), Checkpoint(model)
    config = moe_config(dense, experts, top_k)
    family = FAMILIES[config.model_type]
    temporary = out.with_name(out.name + ".tmp")
    try:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be made: {error.strerror}") from error
    writer, disk = ShardWriter(temporary, "model"), family.on_disk
    gate_up, down = disk.parts["gate_up_proj"], disk.parts["down_proj"]
    copies = {"gate_proj": gate_up[0], "up_proj": gate_up[1], "down_proj": down[0]}
    generator = torch.Generator().manual_seed(seed)
    for name in source.entries:
        tensor = source.read(name)
        prefix, is_mlp, part = name.partition(".mlp.")
        if not is_mlp:
            writer.add(name, tensor)
            continue
        block = f"{prefix}.{disk.block or family.block}"
        for e in range(experts):
            writer.add(f"{block}.{copies[part.removesuffix('.weight')].format(e=e)}", tensor)
    for i in range(config.num_hidden_layers):
        gate = torch.randn(experts, config.hidden_size, generator=generator) * noise
        writer.add(f"model.layers.{i}.{disk.block or family.block}.{family.gate}.weight", gate.to(tensor.dtype))
    writer.close()
    write_index(temporary, writer.where, writer.num_bytes)
    config.architectures = ["MixtralForCausalLM" if config.model_type == "mixtral" else "Qwen3MoeForCausalLM"]
    config.save_pretrained(temporary)
    for companion in COMPANIONS:
        if (model / companion).exists():
            shutil.copy(model / companion, temporary / companion)
    if out.exists():
        shutil.rmtree(out)
    temporary.rename(out)
    click.echo(f"{out}: {config.model_type}, {experts} experts, top-{top_k}, {writer.num_bytes / 1e9:.2f} GB ({INDEX})")
