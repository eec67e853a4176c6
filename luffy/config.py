"""What a model and its run are made of: frozen, validated dataclasses.

A configuration is checked when it is made, not when a kernel trips over it an hour later. Every message names the
option a person would change. `PRESETS` holds the models by name: the four of the benchmarks at their published
size, and a `-tiny` form of each that trains on a laptop.

Sizes of the paper's models (arXiv 2411.15419, section VI): MoE-GPT2 12 x 768/3072 length 1024, MoE-BERT-Large
24 x 768/3072 length 512, MoE-TransformerXL 18 x 1024/4096 length 250; top-2, 16 experts. `moe-llm` follows
OLMoE (arXiv 2409.02060): 16 x 2048, 64 experts of width 1024, top-8.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from luffy.errors import UserError
from luffy.ranges import AT_LEAST_ONE, COUNT, NOT_NEGATIVE, POSITIVE

DTYPES = ("bfloat16", "float32", "float64")
SEAT_LOSS_FORMS = ("mass", "rows")


def _require(condition: bool, message: str) -> None:
    if not condition:
        raise UserError(message)


def _one_of(option: str, value: str, allowed: tuple[str, ...]) -> None:
    _require(value in allowed, f"{option} {value!r} is unknown; choose one of {', '.join(allowed)}")


@dataclass(frozen=True)
class RouterConfig:
    """How tokens choose experts, and what the choice costs.

    `score`: "softmax" over all experts, or independent "sigmoid" scores (DeepSeek-V3).
    `normalize_topk`: the k chosen weights are rescaled to sum to one.
    `balance_loss`: weight of E * sum_e f_e P_e (Switch, arXiv 2101.03961), f and P over the tokens of a micro-batch on
    all ranks.
    `z_loss`: weight of mean(logsumexp(logits)^2) (ST-MoE, arXiv 2202.08906).
    `locality_loss`: weight of sum_s (L_s / T) H(p_s) - H(p), with p_s the mean probabilities of sequence s (L_s of T
    tokens) and p the mean of all: minus the mutual information of sequence and expert. It asks that a sequence be
    served by few experts while all experts stay in use, which is what sequence migration lives on. It is a
    mean over MoE layers, where the other two are sums: a weight that is free for 6 layers is free for 24.
    `seat_loss`: weight of what pulls tokens to the experts of their sequence's topic, where sequences have topics
    (luffy.model.seat_loss); a mean over MoE layers as well. `seat_loss_form`: how it counts.
    `num_groups`, `top_k_groups`: experts stand in so many equal groups, and a token chooses among the experts of its
    best few groups only (DeepSeek-V2, arXiv 2405.04434, limits devices so; a group's score is the sum of its best
    k / top_k_groups scores). 0: no groups.
    `bias_update_rate`: > 0 turns on the loss-free balancing bias (arXiv 2408.15664), added for the choice only.
    `capacity_factor`: None is dropless; else an expert takes at most ceil(factor * length * k / E) tokens of each
    sequence, earlier tokens first. Capacity is per sequence, so what is dropped depends neither on the rank that
    holds the sequence nor on later tokens.
    """

    num_experts: int = 16
    top_k: int = 2
    score: str = "softmax"
    normalize_topk: bool = True
    balance_loss: float = 0.01
    z_loss: float = 0.001
    locality_loss: float = 0.0
    seat_loss: float = 0.0
    seat_loss_form: str = "mass"
    num_groups: int = 0
    top_k_groups: int = 0
    bias_update_rate: float = 0.0
    capacity_factor: float | None = None

    def __post_init__(self) -> None:
        _one_of("--router-score", self.score, ("softmax", "sigmoid"))
        AT_LEAST_ONE.check("--experts", self.num_experts)
        AT_LEAST_ONE.check("--top-k", self.top_k)
        _require(
            self.top_k <= self.num_experts,
            f"--top-k {self.top_k}: give a whole number from 1 to --experts, {self.num_experts}",
        )
        for option, value in (
            ("--balance-loss", self.balance_loss),
            ("--z-loss", self.z_loss),
            ("--locality-loss", self.locality_loss),
            ("--seat-loss", self.seat_loss),
            ("--bias-update-rate", self.bias_update_rate),
        ):
            NOT_NEGATIVE.check(option, value)
        POSITIVE.check("--capacity-factor", self.capacity_factor)  # None is dropless
        _one_of("--seat-loss-form", self.seat_loss_form, SEAT_LOSS_FORMS)
        COUNT.check("--num-groups", self.num_groups)
        COUNT.check("--top-k-groups", self.top_k_groups)
        if self.num_groups or self.top_k_groups:
            G, limit, E = self.num_groups, self.top_k_groups, self.num_experts
            _require(G >= 1 and E % G == 0, f"--num-groups {G} must divide --experts {E}; give it with --top-k-groups")
            _require(
                1 <= limit <= G and limit * (E // G) >= self.top_k,
                f"--top-k-groups {limit} of {G} groups of {E // G} experts do not hold --top-k {self.top_k}",
            )


@dataclass(frozen=True)
class ModelConfig:
    """One transformer with pluggable parts.

    `expert_hidden_size` is an expert's inner width F; `dense_hidden_size` that of the blocks without experts.
    Block i (from 0) has experts when (i + 1) % `moe_every` == 0. `num_shared_experts` experts of width F see every
    token and never leave its rank. `latent_size` > 0: rows go to routed experts, and come back, projected to so many
    elements (luffy.model.latent). `memory_length` > 0 (relative positions only) is Transformer-XL's segment
    recurrence: keys and values also cover that many hidden states of the lane's previous segment.
    """

    name: str = "custom"
    vocab_size: int = 50257
    hidden_size: int = 768
    num_layers: int = 12
    num_heads: int = 12
    dense_hidden_size: int = 3072
    expert_hidden_size: int = 3072
    max_sequence_length: int = 1024
    causal: bool = True
    position: str = "learned"
    norm: str = "layernorm"
    norm_placement: str = "pre"
    activation: str = "gelu"
    qk_norm: bool = False
    bias: bool = True
    tie_embeddings: bool = True
    num_shared_experts: int = 0
    latent_size: int = 0
    moe_every: int = 1
    memory_length: int = 0
    rope_base: float = 10000.0
    norm_eps: float = 1e-5
    init_std: float = 0.02
    router: RouterConfig = RouterConfig()

    def __post_init__(self) -> None:
        _one_of("--position", self.position, ("learned", "rope", "relative"))
        _one_of("--norm", self.norm, ("layernorm", "rmsnorm"))
        _one_of("--norm-placement", self.norm_placement, ("pre", "post"))
        _one_of("--activation", self.activation, ("gelu", "swiglu"))
        for option, value in (
            ("--layers", self.num_layers),
            ("--hidden-size", self.hidden_size),
            ("--heads", self.num_heads),
            ("--expert-hidden-size", self.expert_hidden_size),
            ("--dense-hidden-size", self.dense_hidden_size),
            ("--max-sequence-length", self.max_sequence_length),
            ("--vocab-size", self.vocab_size),
            ("--moe-every", self.moe_every),
        ):
            AT_LEAST_ONE.check(option, value)
        COUNT.check("--shared-experts", self.num_shared_experts)
        COUNT.check("--memory-length", self.memory_length)
        COUNT.check("--latent-size", self.latent_size)
        _require(
            self.latent_size < self.hidden_size,
            f"--latent-size {self.latent_size} must be below --hidden-size {self.hidden_size}; leave it out",
        )
        for option, number in (("rope_base", self.rope_base), ("norm_eps", self.norm_eps)):
            POSITIVE.check(option, number)
        NOT_NEGATIVE.check("init_std", self.init_std)
        _require(
            self.hidden_size % self.num_heads == 0,
            f"--hidden-size {self.hidden_size} must be a multiple of --heads {self.num_heads}",
        )
        _require(self.position != "rope" or self.head_size % 2 == 0, "rotary positions need an even head size")
        _require(
            self.memory_length == 0 or (self.position == "relative" and self.causal),
            "--memory-length needs a causal model with relative positions (moe-transformer-xl)",
        )

    @property
    def head_size(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def row_size(self) -> int:
        """Elements of a row that travels to experts."""
        return self.latent_size or self.hidden_size

    def is_moe_layer(self, layer: int) -> bool:
        return (layer + 1) % self.moe_every == 0

    @property
    def num_moe_layers(self) -> int:
        return sum(self.is_moe_layer(i) for i in range(self.num_layers))

    def check_ranks(self, ep_size: int) -> None:
        _require(
            self.router.num_experts % ep_size == 0,
            f"--experts {self.router.num_experts} cannot be divided over {ep_size} expert-parallel ranks; "
            f"choose a multiple of {ep_size}, or another --ranks or --ep-size",
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        known = {f.name for f in fields(cls)}
        unknown = set(data) - known
        _require(not unknown, f"unknown model settings {sorted(unknown)}: written by another version of luffy?")
        values = dict(data)
        if isinstance(values.get("router"), Mapping):
            values["router"] = RouterConfig(**values["router"])
        return cls(**values)

    def override(self, **changes: Any) -> ModelConfig:
        """A copy with `changes` (None means: leave as it is); router settings are reached by their own names."""
        router_names = {f.name for f in fields(RouterConfig)}
        changes = {k: v for k, v in changes.items() if v is not None}
        router = {k: changes.pop(k) for k in list(changes) if k in router_names}
        return replace(self, **changes, router=replace(self.router, **router))


def _tiny(config: ModelConfig, **changes: Any) -> ModelConfig:
    small: dict[str, Any] = {
        "name": config.name + "-tiny",
        "vocab_size": 8192,
        "hidden_size": 128,
        "num_layers": 4,
        "num_heads": 4,
        "dense_hidden_size": 512,
        "expert_hidden_size": 256,
        "max_sequence_length": 256,
        "num_experts": 8,
    }
    return config.override(**(small | changes))


_GPT2 = ModelConfig(name="moe-gpt2")
_BERT = ModelConfig(
    name="moe-bert-large",
    vocab_size=30522,
    num_layers=24,
    max_sequence_length=512,
    causal=False,
    norm_placement="post",
    # Post-norm writes the normed sum into the stream; a smaller z-loss keeps its logits free early on.
    router=RouterConfig(z_loss=1e-4),
)
_XL = ModelConfig(
    name="moe-transformer-xl",
    vocab_size=50257,
    hidden_size=1024,
    num_layers=18,
    num_heads=16,
    dense_hidden_size=4096,
    expert_hidden_size=4096,
    max_sequence_length=250,
    position="relative",
)
_LLM = ModelConfig(
    name="moe-llm",
    vocab_size=50304,
    hidden_size=2048,
    num_layers=16,
    num_heads=16,
    dense_hidden_size=8192,
    expert_hidden_size=1024,
    max_sequence_length=4096,
    position="rope",
    norm="rmsnorm",
    activation="swiglu",
    qk_norm=True,
    bias=False,
    tie_embeddings=False,
    router=RouterConfig(num_experts=64, top_k=8, normalize_topk=False),
)

PRESETS: dict[str, ModelConfig] = {
    c.name: c
    for c in (
        _GPT2,
        _BERT,
        _XL,
        _LLM,
        _tiny(_GPT2),
        _tiny(_BERT),
        _tiny(_XL, max_sequence_length=250),
        _tiny(_LLM, expert_hidden_size=128, num_experts=16, top_k=4),
    )
}


def model_preset(name: str) -> ModelConfig:
    """The model called `name`; raises `UserError` with the known names otherwise."""
    _require(name in PRESETS, f"--model {name!r} is unknown; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]
