"""Families: what has to be known of a kind of Hugging Face model to run its experts in parallel. One object each.

A decoder of the library is a stack of layers: norm, attention, norm, feed-forward, each half with its residual. Luffy
replaces the feed-forward of the layers that have experts, and calls everything else as it is. So a family only says how
those blocks look: where the gate and the shared experts are, how the gate scores, what an expert computes, and under
which names the weights stand in a checkpoint.

Since transformers 5 every gate answers alike, (logits [T, E], weights [T, K], ids [T, K]); it is kept and called, so
group limits, bias corrections and scaling factors are the library's own code.

To add one, describe it and register it:

    register(replace(QWEN3_MOE, model_type="my_moe", gate="router"))
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from luffy.errors import UserError
from luffy.hf.quantized import method_of
from luffy.kernels.activation import Activation


@dataclass(frozen=True)
class OnDisk:
    """Names of the experts' weights in a checkpoint, relative to the block of a layer.

    parts: for each parameter of the block's experts, the names that it is made of: with `{e}`, one tensor an expert,
    several of them end to end along the expert's first axis (gate, then up); without, a stacked tensor as it is.
    block: name of the block on disk, where it differs from the module's. renamed: other tensors of a block that have
    another name on disk.
    """

    parts: dict[str, tuple[str, ...]]
    block: str | None = None
    renamed: dict[str, str] = field(default_factory=dict)


GATE_UP_DOWN = OnDisk(
    {
        "gate_up_proj": ("experts.{e}.gate_proj.weight", "experts.{e}.up_proj.weight"),
        "down_proj": ("experts.{e}.down_proj.weight",),
    }
)


def gated(block: Any) -> Activation:
    """gate_up [P, 2F] -> act(gate) * up [P, F], with the block's own activation."""
    act = block.experts.act_fn
    if type(act).__name__ in ("SiLU", "SiLUActivation"):
        return "swiglu"

    def activate(x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return act(gate) * up

    return activate


def gpt_oss_gate(block: Any) -> Activation:
    """Gate and up interleaved, clamped, and up shifted by one: arXiv 2508.10925, with the block's constants."""
    alpha, limit = block.experts.alpha, block.experts.limit

    def activate(x: Tensor) -> Tensor:
        gate, up = x[..., ::2].clamp(max=limit), x[..., 1::2].clamp(min=-limit, max=limit)
        return (up + 1) * (gate * torch.sigmoid(gate * alpha))

    return activate


@dataclass(frozen=True)
class Half:
    """How attention or feed-forward, f, joins the stream x: scale * f(norm(x)) is added to x.

    kept: where given, it is added to kept * norm(x) instead.
    """

    scale: float = 1.0
    kept: float | None = None

    def start(self, x: Tensor, normed: Tensor) -> Tensor:
        """What f's answer is added to, [T, D]."""
        if self.kept is None:
            return x
        return normed if self.kept == 1 else self.kept * normed

    def scaled(self, answer: Tensor) -> Tensor:
        return answer if self.scale == 1 else self.scale * answer


def halves_of(layer: Any) -> tuple[Half, Half]:
    """Attention's and feed-forward's, by the factors that a decoder layer holds (Granite's and MiniMax's names)."""
    if hasattr(layer, "residual_multiplier"):
        half = Half(scale=float(layer.residual_multiplier))
        return half, half
    if hasattr(layer, "attn_alpha_factor"):
        return (
            Half(float(layer.attn_beta_factor), float(layer.attn_alpha_factor)),
            Half(float(layer.mlp_beta_factor), float(layer.mlp_alpha_factor)),
        )
    return Half(), Half()


def embedding_factor(lm: Any) -> float:
    """What the library's causal LM multiplies its embeddings by."""
    return float(getattr(lm.model, "embedding_multiplier", 1.0))


def logits_divisor(lm: Any) -> float:
    """What it divides its logits by."""
    return float(getattr(lm, "logits_scaling", 1.0))


@dataclass(frozen=True)
class Family:
    """One kind of model, by its `config.model_type`.

    num_experts, top_k, expert_width: names of those settings in the model's configuration.
    block: attribute of a decoder layer that holds the feed-forward. gate, shared: attributes of a block with experts
    (a block without attribute `experts` is dense and left alone); shared None: no shared experts. shared_gate: a
    linear map whose sigmoid the shared experts' answer is multiplied by, None for none.
    score: how the gate's logits become probabilities for the auxiliary losses, "softmax" or "sigmoid".
    bias_buffer: the buffer, of the gate or of the block, that is added to the scores for the choice only, or None.
    attention: linear maps of attention, for adapters.
    activate: block -> what lies between an expert's two products.
    transposed: expert weights lie [in, out] instead of [out, in]. biases: experts have them, named `*_bias`.
    weighs_input: an expert's input is multiplied by its weight, not its answer.
    noise: settings of the configuration that let a layer draw random factors, unless they are 0.
    normalizes: configuration -> whether the weights of a token's experts sum to one.
    on_disk: see OnDisk.
    """

    model_type: str
    num_experts: str = "num_experts"
    top_k: str = "num_experts_per_tok"
    expert_width: str = "moe_intermediate_size"
    block: str = "mlp"
    gate: str = "gate"
    shared: str | None = None
    shared_gate: str | None = None
    score: str = "softmax"
    bias_buffer: str | None = None
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj")
    activate: Callable[[Any], Activation] = gated
    transposed: bool = False
    biases: bool = False
    weighs_input: bool = False
    noise: tuple[str, ...] = ("router_jitter_noise", "input_jitter_noise")
    normalizes: Callable[[Any], bool] = lambda config: bool(config.norm_topk_prob)
    on_disk: OnDisk = field(default=GATE_UP_DOWN)

    def is_sparse(self, layer: nn.Module) -> bool:
        return hasattr(getattr(layer, self.block), "experts")

    def check(self, config: Any) -> None:
        """UserError for what this family can be configured to do and Luffy cannot."""
        for name in self.noise:
            if getattr(config, name, 0.0):
                raise UserError(
                    f"{name} {getattr(config, name)}: a random factor on what experts see would depend on the rank "
                    "that draws it; set it to 0 in the model's configuration"
                )
        if (method := method_of(config)) is not None:
            raise UserError(f"quantized weights ({method}) cannot be trained here; convert the model first")


MIXTRAL = Family(
    "mixtral",
    num_experts="num_local_experts",
    expert_width="intermediate_size",
    normalizes=lambda config: True,
    on_disk=OnDisk(
        {
            "gate_up_proj": ("experts.{e}.w1.weight", "experts.{e}.w3.weight"),
            "down_proj": ("experts.{e}.w2.weight",),
        },
        block="block_sparse_moe",
    ),
)
QWEN3_MOE = Family("qwen3_moe")
OLMOE = Family("olmoe", expert_width="intermediate_size")
DEEPSEEK_V3 = Family(
    "deepseek_v3",
    num_experts="n_routed_experts",
    shared="shared_experts",
    score="sigmoid",
    bias_buffer="e_score_correction_bias",
    attention=("q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"),
)
GLM4_MOE = replace(DEEPSEEK_V3, model_type="glm4_moe", attention=QWEN3_MOE.attention)
QWEN2_MOE = Family("qwen2_moe", shared="shared_expert", shared_gate="shared_expert_gate")
GPT_OSS = Family(
    "gpt_oss",
    num_experts="num_local_experts",
    expert_width="intermediate_size",
    gate="router",
    activate=gpt_oss_gate,
    transposed=True,
    biases=True,
    normalizes=lambda config: True,
    on_disk=OnDisk(
        {name: (f"experts.{name}",) for name in ("gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")}
    ),
)
# Its gate draws experts at random in training, as dropout does (arXiv 2409.12136). What its configuration calls the
# router's noise is the threshold below which an expert is not drawn.
PHIMOE = replace(
    MIXTRAL,
    model_type="phimoe",
    gate="router",
    noise=("input_jitter_noise",),
    normalizes=lambda config: False,
    on_disk=replace(MIXTRAL.on_disk, renamed={"router.weight": "gate.weight"}),
)

FAMILIES: dict[str, Family] = {}


def register(family: Family) -> Family:
    """Make a family known to `parallelize`, `load` and the command line."""
    FAMILIES[family.model_type] = family
    return family


for _family in (MIXTRAL, QWEN2_MOE, QWEN3_MOE, OLMOE, DEEPSEEK_V3, GLM4_MOE, GPT_OSS, PHIMOE):
    register(_family)


def family_of(config: Any) -> Family:
    """The family of a model's configuration, found by structure where nobody described it; else UserError."""
    family = FAMILIES.get(config.model_type)
    if family is None:
        from luffy.hf.structure import infer

        family = register(infer(config))
    family.check(config)
    return family
