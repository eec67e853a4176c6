"""A family found by structure: what the model's own modules and the library's table of conversions say.

The model is built without memory, a layer with experts is looked at, and what was found is tried: a layer of the same
class with few experts and random weights must answer as the parts do that Luffy would call (attention, norms, gate,
experts, shared experts, each half added to the stream by `halves_of`), and the model without its layers as embedding,
norm and head do. What does not is refused, never guessed.
"""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from luffy.errors import UserError
from luffy.hf.families import Family, OnDisk, embedding_factor, halves_of, logits_divisor
from luffy.kernels.activation import activate
from luffy.model.library import gate_answer, score_told

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_TOP_K = ("num_experts_per_tok", "moe_topk", "moe_k", "num_experts_per_token")
_WIDTH = ("moe_intermediate_size", "intermediate_size", "expert_ffn_hidden_size")
_BIAS = "e_score_correction_bias"
_DROPOUTS = ("attention_dropout", "hidden_dropout", "dropout", "resid_pdrop")


def infer(config: Any) -> Family:
    """The family of a configuration that nobody described. UserError, saying why, where it is of another build."""
    from transformers import AutoModelForCausalLM

    kind = config.model_type
    try:
        with torch.device("meta"):
            lm: Any = AutoModelForCausalLM.from_config(config)
        layers = list(lm.model.layers)
    except Exception as error:  # whatever a model's own code finds wrong
        raise _unknown(kind, f"no causal decoder of it can be built: {error}") from error
    index, block_name = _sparse(layers, kind)
    block = getattr(layers[index], block_name)
    gate = next((n for n in ("gate", "router") if hasattr(block, n)), None)
    if gate is None:
        raise _unknown(kind, f"its {block_name} has neither gate nor router")
    others = [n for n, m in block.named_children() if n not in (gate, "experts") and any(True for _ in m.parameters())]
    shared_gates = [n for n in others if isinstance(getattr(block, n), nn.Linear)]
    shared = [n for n in others if n not in shared_gates]
    if len(shared) > 1 or len(shared_gates) > len(shared):
        raise _unknown(kind, f"its {block_name} has parts that are not known: {', '.join(others)}")
    experts, rows, columns = block.experts.down_proj.shape
    transposed = block.experts.gate_up_proj.shape[1:] == (columns, 2 * rows)
    family = Family(
        kind,
        num_experts=_setting(config, _EXPERTS, experts, kind),
        top_k=_setting(config, _TOP_K, None, kind),
        expert_width=_setting(config, _WIDTH, rows if transposed else columns, kind),
        block=block_name,
        gate=gate,
        shared=shared[0] if shared else None,
        shared_gate=shared_gates[0] if shared_gates else None,
        bias_buffer=_BIAS if _BIAS in getattr(block, gate)._buffers or _BIAS in block._buffers else None,
        attention=_linear_names(layers),
        transposed=transposed,
        on_disk=_on_disk(kind, block_name),
    )
    _try_ends(lm, config)
    return _tried(lm, config, family, index)


def _unknown(kind: str, why: str) -> UserError:
    from luffy.hf.families import FAMILIES

    return UserError(
        f"model_type {kind!r} is not one of {', '.join(FAMILIES)}, and not built as they are: {why}; "
        "docs/huggingface.md says how to describe a family"
    )


def _sparse(layers: list[Any], kind: str) -> tuple[int, str]:
    """A layer with stacked experts and ordinary attention, and the name of its feed-forward."""
    for i, layer in enumerate(layers):
        for name, child in layer.named_children():
            experts = getattr(child, "experts", None)
            if experts is None or not hasattr(layer, "self_attn"):
                continue
            stacked = [n for n, _ in experts.named_parameters()] == ["gate_up_proj", "down_proj"]
            if not stacked or not hasattr(experts, "act_fn"):
                raise _unknown(kind, "its experts are not two stacked weights, gate_up_proj and down_proj")
            return i, name
    raise _unknown(kind, "no layer has attention and stacked experts")


def _setting(config: Any, names: tuple[str, ...], value: int | None, kind: str) -> str:
    for name in names:
        found = getattr(config, name, None)
        if isinstance(found, int) and (value is None or found == value):
            return name
    raise _unknown(kind, f"its configuration has none of {', '.join(names)}" + ("" if value is None else f" = {value}"))


def _linear_names(layers: list[Any]) -> tuple[str, ...]:
    """Linear maps of attention."""
    found = {n: None for layer in layers if hasattr(layer, "self_attn")
             for n, m in layer.self_attn.named_children() if isinstance(m, nn.Linear)}  # fmt: skip
    return tuple(found)


# A prefix of the language model's names in folders of models that also see, which luffy.hf.files leaves out.
_OF_SEEING_MODELS = r"\^?model\.language_model\."


def _on_disk(kind: str, block: str) -> OnDisk:
    """Names in a checkpoint, by the library's own table of conversions."""
    from transformers.conversion_mapping import get_checkpoint_conversion_mapping

    parts: dict[str, tuple[str, ...]] = {
        name: (f"experts.{name}",) for name in ("gate_up_proj", "down_proj")
    }  # stacked, if nothing else is said
    disk_block, renamed = None, {}
    for entry in get_checkpoint_conversion_mapping(kind) or []:
        sources = [s.replace("\\.", ".").lstrip(".") for s in entry.source_patterns]
        target = entry.target_patterns[0].replace("\\.", ".").lstrip(".")
        name, (block_there, _, rest) = target.rpartition(".")[2], sources[0].partition(".")
        if name in parts and all("experts.*." in s for s in sources):
            parts[name] = tuple("experts." + s.split("experts.")[1].replace("*", "{e}") for s in sources)
        elif len(sources) > 1:
            raise _unknown(kind, f"its checkpoints are converted in a way that is not known: {sources} -> {target}")
        elif target.rstrip(".") == block:
            disk_block = sources[0].rstrip(".")
        elif target.startswith(f"{block}.experts.") and name in parts and block_there in (block, disk_block):
            parts[name] = (rest,)
        elif target.startswith(f"{block}.") and block_there in (block, disk_block):
            if rest != target.removeprefix(f"{block}."):
                renamed[target.removeprefix(f"{block}.")] = rest
        elif not re.match(_OF_SEEING_MODELS, sources[0]):
            raise _unknown(kind, f"its checkpoints are converted in a way that is not known: {sources} -> {target}")
    return OnDisk(parts, disk_block, renamed)


@torch.no_grad()
def _tried(lm: Any, config: Any, family: Family, index: int) -> Family:
    """The family with what only numbers tell (how the gate scores); UserError if a layer computes something else."""
    probe = copy.deepcopy(config)
    few = min(getattr(config, family.num_experts), max(8, 2 * getattr(config, family.top_k)))
    for name in _EXPERTS:
        if isinstance(getattr(probe, name, None), int):
            setattr(probe, name, few)
    for name in _DROPOUTS:
        if isinstance(getattr(probe, name, None), float):
            setattr(probe, name, 0.0)
    probe._attn_implementation = probe._experts_implementation = "eager"
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        try:
            layer = type(lm.model.layers[index])(probe, index).float()
            for p in [*layer.parameters(), *layer.buffers()]:
                if p.is_floating_point():
                    p.copy_(0.5 * torch.randn(p.shape) * p.shape[-1] ** -0.5 + (p.dim() < 2))
            x = torch.randn(1, 6, config.hidden_size)
            rotary = type(lm.model.rotary_emb)(config=probe)
            frame = {"position_embeddings": rotary(x, position_ids=torch.arange(6)[None]), "attention_mask": None}
            wanted = [layer.train(mode)(x.clone(), **frame) for mode in (True, False)]
            wanted = [w[0] if isinstance(w, tuple) else w for w in wanted]
            first, second = halves_of(layer)
            normed = layer.input_layernorm(x)
            h = first.start(x, normed) + first.scaled(layer.self_attn(hidden_states=normed, **frame)[0])
            normed = layer.post_attention_layernorm(h)[0]
            block = getattr(layer, family.block)
            answers = [_feed_forward(block, f, normed) for f in (family, replace(family, weighs_input=True))]
            found = [second.start(h, normed) + second.scaled(answer) for *_, answer in answers]
            logits, weights, ids, _ = answers[0]
        except Exception as error:  # whatever another build's code says
            raise _unknown(family.model_type, f"a layer of it cannot be tried ({error})") from error
    same = [all(torch.allclose(w, f, rtol=1e-4, atol=1e-4) for w in wanted) for f in found]
    if not any(same):
        raise _unknown(family.model_type, "a layer of it computes something else than the sum of its parts")
    told = score_told(logits, weights, ids)
    if told is None:
        raise _unknown(family.model_type, "its gate's weights are neither softmax nor sigmoid of its logits")
    return replace(family, score=told[0], normalizes=_always if told[1] else _never, weighs_input=not same[0])


@torch.no_grad()
def _try_ends(lm: Any, config: Any) -> None:
    """UserError if the model without its layers is not embedding, norm and head, with the factors that are known."""
    kind = config.model_type
    try:
        probe = copy.deepcopy(config)
        probe.vocab_size, probe.pad_token_id = 16, None
        with torch.device("meta"):
            ends = type(lm)(probe)
        ends.model.layers = nn.ModuleList()
        ends = ends.to_empty(device="cpu").float().eval()
        generator = torch.Generator().manual_seed(0)
        for tensor in [*ends.parameters(), *ends.buffers()]:
            if tensor.is_floating_point():
                tensor.copy_(torch.randn(tensor.shape, generator=generator))
        tokens = torch.arange(6)[None]
        wanted = ends(tokens, use_cache=False).logits
        hidden = ends.model.norm(ends.model.embed_tokens(tokens) * embedding_factor(ends))
        found = ends.get_output_embeddings()(hidden) / logits_divisor(ends)
    except Exception as error:  # whatever another build's code says
        raise _unknown(kind, f"its embedding and head cannot be tried ({error})") from error
    if not torch.allclose(found, wanted, rtol=1e-4, atol=1e-4):
        raise _unknown(kind, "its logits are something else than those of embedding, norm and head")


def _always(config: Any) -> bool:
    return True


def _never(config: Any) -> bool:
    return False


def _feed_forward(block: Any, family: Family, y: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """y [T, D] -> logits, weights and ids of the gate, and the answer of the block as Luffy computes it."""
    bias = [b for b in block._buffers.values() if b is not None]
    top_k = getattr(block, "top_k", None) or getattr(block, family.gate).top_k
    logits, weights, ids = gate_answer(getattr(block, family.gate)(y, *bias), top_k)
    experts, activation, out = block.experts, family.activate(block), torch.zeros_like(y)
    w_in, w_out = (w.mT if family.transposed else w for w in (experts.gate_up_proj, experts.down_proj))
    for k in range(ids.shape[1]):
        for t, e in enumerate(ids[:, k].tolist()):
            before, after = (weights[t, k], 1) if family.weighs_input else (1, weights[t, k])
            hidden = activate((w_in[e] @ (before * y[t]))[None], activation)[0]
            out[t] += after * (w_out[e] @ hidden)
    if family.shared is not None:
        shared = getattr(block, family.shared)(y)
        out += shared if family.shared_gate is None else getattr(block, family.shared_gate)(y).sigmoid() * shared
    return logits, weights, ids, out
