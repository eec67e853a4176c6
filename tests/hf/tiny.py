"""Tiny random models of each family, and a way to compute what the library does in float64 throughout."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Dots1Config,
    Ernie4_5_MoeConfig,
    ExaoneMoeConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    HunYuanMoEV1Config,
    Llama4TextConfig,
    MiniMaxConfig,
    MiniMaxM2Config,
    MixtralConfig,
    OlmoeConfig,
    PhimoeConfig,
    PreTrainedConfig,
    Qwen2MoeConfig,
    Qwen3_5MoeTextConfig,
    Qwen3MoeConfig,
    Qwen3NextConfig,
)

# Families that nobody described: luffy.hf.structure finds out.
FOUND_BY_STRUCTURE = (
    "dots1", "ernie4_5_moe", "exaone_moe", "granitemoe", "hunyuan_v1_moe", "llama4_text", "minimax", "minimax_m2",
    "qwen3_5_moe_text", "qwen3_next",
)  # fmt: skip

SMALL: dict[str, Any] = {
    "vocab_size": 61,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "num_experts_per_tok": 2,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_config(family: str, **changes: Any) -> PreTrainedConfig:
    """Eight experts, three layers; every option of a family that is easily got wrong is on."""
    if family == "mixtral":
        config = MixtralConfig(**SMALL, intermediate_size=24, num_local_experts=8, sliding_window=7)
    elif family == "qwen3_moe":
        config = Qwen3MoeConfig(
            **SMALL, intermediate_size=40, moe_intermediate_size=24, num_experts=8, norm_topk_prob=True, head_dim=16,
            mlp_only_layers=[1],
        )  # fmt: skip
    elif family == "olmoe":
        config = OlmoeConfig(**SMALL, intermediate_size=24, num_experts=8, norm_topk_prob=False, clip_qkv=1.5)
    elif family == "deepseek_v3":
        config = DeepseekV3Config(
            **SMALL | {"num_key_value_heads": 4}, intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8,
            n_shared_experts=2, n_group=4, topk_group=2, first_k_dense_replace=1, routed_scaling_factor=1.7,
            q_lora_rank=12, kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=12,
            norm_topk_prob=True,
        )  # fmt: skip
    elif family in ("glm4_moe", "dots1"):
        config = {"glm4_moe": Glm4MoeConfig, "dots1": Dots1Config}[family](
            **SMALL, intermediate_size=40, moe_intermediate_size=24, n_routed_experts=8, n_shared_experts=1,
            n_group=1, topk_group=1, first_k_dense_replace=1, routed_scaling_factor=0.9, head_dim=16, use_qk_norm=True,
        )  # fmt: skip
    elif family == "qwen2_moe":
        config = Qwen2MoeConfig(
            **SMALL, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=28, num_experts=8,
            norm_topk_prob=False, decoder_sparse_step=2,
        )  # fmt: skip
    elif family == "exaone_moe":
        config = ExaoneMoeConfig(
            **SMALL, intermediate_size=40, moe_intermediate_size=24, num_experts=8, num_shared_experts=1, n_group=2,
            topk_group=1, first_k_dense_replace=1, head_dim=16, sliding_window=5,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
        )  # fmt: skip
    elif family == "ernie4_5_moe":
        config = Ernie4_5_MoeConfig(
            **SMALL, intermediate_size=40, moe_intermediate_size=24, moe_num_experts=8, moe_k=2,
            moe_num_shared_experts=2, moe_layer_start_index=1, use_bias=False,
        )  # fmt: skip
    elif family == "hunyuan_v1_moe":
        config = HunYuanMoEV1Config(**SMALL, intermediate_size=24, num_experts=8, moe_topk=2, head_dim=16)
    elif family == "qwen3_next":
        config = Qwen3NextConfig(
            **SMALL, intermediate_size=40, moe_intermediate_size=24, shared_expert_intermediate_size=28, num_experts=8,
            head_dim=16, linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8,
            linear_value_head_dim=8, layer_types=["linear_attention", "full_attention", "linear_attention"],
            mlp_only_layers=[0],
        )  # fmt: skip
    elif family == "qwen3_5_moe_text":
        config = Qwen3_5MoeTextConfig(
            **SMALL, moe_intermediate_size=24, shared_expert_intermediate_size=28, num_experts=8, head_dim=16,
            linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
            layer_types=["linear_attention", "full_attention", "linear_attention"],
        )  # fmt: skip
    elif family == "llama4_text":
        config = Llama4TextConfig(
            **SMALL, intermediate_size=24, intermediate_size_mlp=40, num_local_experts=8, head_dim=8,
            interleave_moe_layer_step=2, moe_layers=[0, 2], no_rope_layers=[1, 1, 0], attention_chunk_size=5,
            layer_types=["chunked_attention", "full_attention", "full_attention"], floor_scale=3,
        )  # fmt: skip
    elif family == "granitemoe":
        config = GraniteMoeConfig(
            **SMALL, intermediate_size=24, num_local_experts=8, embedding_multiplier=1.5, residual_multiplier=0.7,
            logits_scaling=1.3, attention_multiplier=0.4,
        )  # fmt: skip
    elif family == "minimax":
        config = MiniMaxConfig(
            **SMALL, intermediate_size=24, num_local_experts=8, head_dim=8, block_size=4, router_jitter_noise=0.0,
            layer_types=["linear_attention", "full_attention", "linear_attention"], full_attn_alpha_factor=1.3,
            full_attn_beta_factor=0.8, linear_attn_alpha_factor=1.4, linear_attn_beta_factor=0.9,
            mlp_alpha_factor=1.5, mlp_beta_factor=0.6,
        )  # fmt: skip
    elif family == "minimax_m2":
        config = MiniMaxM2Config(**SMALL, intermediate_size=24, num_local_experts=8, head_dim=8)
    elif family == "phimoe":
        config = PhimoeConfig(
            **SMALL, intermediate_size=24, num_local_experts=8, attention_bias=True, lm_head_bias=True,
            router_jitter_noise=0.4, sliding_window=7,
            rope_parameters={"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": 16,
                             "short_factor": [1.1, 1.2, 1.3, 1.4], "long_factor": [2.0] * 4, "factor": 4.0,
                             "short_mscale": 1.2, "long_mscale": 1.3},
        )  # fmt: skip
    else:
        assert family == "gpt_oss"
        config = GptOssConfig(
            **SMALL, intermediate_size=24, num_local_experts=8, head_dim=8, sliding_window=4,
            layer_types=["sliding_attention", "full_attention", "sliding_attention"],
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        )  # fmt: skip
    for name, value in changes.items():
        setattr(config, name, value)
    return config


def tiny_model(config: PreTrainedConfig, dtype: torch.dtype = torch.float64, seed: int = 0) -> nn.Module:
    """A model with weights far from their initial ones: nothing zero, routers sure of themselves."""
    config._attn_implementation, config._experts_implementation = "eager", "eager"
    model = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name or "slope_rate" in name or "decay" in name:
                continue
            noise = torch.randn(p.shape, generator=generator)
            if "norm" in name:
                p.copy_(1 + 0.2 * noise)
            elif p.dim() >= 2 and not name.endswith("_bias"):
                wide = 1.0 if ".gate.weight" in name or ".router.weight" in name else 1.5
                p.copy_(noise * wide * p.shape[-1] ** -0.5)
            else:
                p.copy_(0.2 * noise)
    return model.to(dtype)


@contextlib.contextmanager
def wide() -> Iterator[None]:
    """The library computes norms, softmaxes and rotary angles in float32 whatever the model's dtype. In here float64
    takes float32's place, so that two orders of summation can be compared to more digits than seven. (Not by a
    TorchFunctionMode: that would not reach what is computed again in the backward pass.)"""

    def widened(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            args = tuple(torch.float64 if a is torch.float32 else a for a in args)
            return function(*args, **{k: torch.float64 if v is torch.float32 else v for k, v in kwargs.items()})

        return call

    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(Tensor, "float", Tensor.double))
        # What PhiMoE's gate draws: the same for each token, wherever it is.
        stack.enter_context(
            patch.object(Tensor, "exponential_", lambda t: t.copy_(torch.linspace(0.4, 2, t.shape[-1])))
        )
        stack.enter_context(patch.object(torch, "rand_like", lambda t: torch.full_like(t, 0.5)))
        uniform = Tensor.uniform_
        stack.enter_context(patch.object(Tensor, "uniform_", lambda t, *a, **k: uniform(t, *a, **k) if a or k else t))
        for where, name in ((Tensor, "to"), (Tensor, "type"), (F, "softmax"), (torch, "zeros")):
            stack.enter_context(patch.object(where, name, widened(getattr(where, name))))
        yield


def random_rows(seed: int, num_rows: int, longest: int, vocab_size: int = 61) -> list[tuple[list[int], list[int]]]:
    """(tokens, labels) of sequences of uneven length; some labels are -100."""
    generator = torch.Generator().manual_seed(seed)
    out = []
    for _ in range(num_rows):
        n = int(torch.randint(2, longest + 1, (1,), generator=generator))
        tokens = torch.randint(0, vocab_size, (n,), generator=generator)
        labels = torch.where(torch.rand(n, generator=generator) < 0.2, -100, tokens)
        labels[0] = -100  # nothing predicts it; the library would take padding on its left for its past
        out.append((tokens.tolist(), labels.tolist()))
    return out


def collate(rows: list[tuple[list[int], list[int]]], side: str) -> dict[str, Tensor]:
    """`right`, `left`: a padded [B, L] with its mask. `packed`: one row with position ids that begin anew."""
    if side == "packed":
        ids = torch.tensor([[t for tokens, _ in rows for t in tokens]])
        labels = torch.tensor([[y for _, targets in rows for y in [-100, *targets[1:]]]])
        positions = torch.tensor([[i for tokens, _ in rows for i in range(len(tokens))]])
        return {"input_ids": ids, "labels": labels, "position_ids": positions}
    longest = max((len(tokens) for tokens, _ in rows), default=1)
    ids, labels, mask = [], [], []
    for tokens, targets in rows:
        pad = longest - len(tokens)
        before, after = (pad, 0) if side == "left" else (0, pad)
        ids.append([3] * before + tokens + [3] * after)
        labels.append([-100] * before + targets + [-100] * after)
        mask.append([0] * before + [1] * len(tokens) + [0] * after)

    def shaped(values: list[list[int]]) -> Tensor:
        return torch.tensor(values, dtype=torch.int64).reshape(len(rows), longest)

    return {"input_ids": shaped(ids), "labels": shaped(labels), "attention_mask": shaped(mask)}


def plain_loss(model: Any, rows: list[tuple[list[int], list[int]]], side: str) -> Tensor:
    """The library's own loss of all rows in one process; its gradients are in the model after `backward`."""
    recurrent = ("gpt_oss", "minimax", "qwen3_next", "qwen3_5_moe_text")
    if model.config.model_type in recurrent and side == "packed":
        side = "right"  # these know no packed rows in the library: tokens would see the sequences before
    if model.config.model_type in ("hunyuan_v1_moe", "llama4_text", "minimax"):
        # Padding on the left counts as places there, which matter to norms that follow rotations, to queries scaled by
        # place, and to the last digits of decays that are kept in float32, a factor a block.
        side = "right"
    return model(**collate(rows, side), use_cache=False).loss


CHAT_TEMPLATE = (
    "{% for m in messages %}{{ '<' + m.role + '>' + m.content + '<eos>' }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
MARKED_TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<eos>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<eos>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tiny_tokenizer(chat_template: str | None = CHAT_TEMPLATE) -> Any:
    """A token for each printable character, and one for the end of a text: 97 in all."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {chr(code): code - 32 for code in range(32, 127)} | {"<eos>": 95, "<unk>": 96}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", unk_token="<unk>")
    fast.chat_template = chat_template
    return fast
