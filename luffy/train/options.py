"""The options of a training run: one frozen dataclass, which is also the command line.

Every field is an option (`batch_size` is `--batch-size`), its help text beside it. What can be checked without
touching data or devices is checked when the object is made, so a mistake costs a second, not a launch.
"""

from __future__ import annotations

from dataclasses import Field, asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, ClassVar

from luffy.config import DTYPES, SEAT_LOSS_FORMS, ModelConfig, _one_of, _require, model_preset
from luffy.inputs import keep_run_apart
from luffy.plan.topology import Topology, parse_topology
from luffy.ranges import AT_LEAST_ONE, COUNT, NOT_NEGATIVE, POSITIVE, SEED, SHARE, Range
from luffy.recipes import SEATS, Recipe, get_recipe
from luffy.report.units import parse_num_bytes
from luffy.train.loggers import check_log
from luffy.wire_format import SUM_FORMATS


def option(default: Any, help: str, group: str) -> Any:
    return field(default=default, metadata={"help": help, "group": group})


def option_name(f: Field[Any]) -> str:
    return "--" + f.name.replace("_", "-")


RANGES = {
    **dict.fromkeys(
        ("ranks", "steps", "batch_size", "accumulate", "eval_batches", "auto_every", "ep_size", "ranks_per_node",
         "sequence_length", "vocab_size", "min_ranks", "topics"), AT_LEAST_ONE,
    ),
    **dict.fromkeys(
        ("eval_every", "checkpoint_every", "rehome_every", "trace_every", "keep_checkpoints", "condense_warmup",
         "warmup_steps", "seat_loss_warmup", "max_restarts", "skip_bad_steps"), COUNT,
    ),
    **dict.fromkeys(("lr", "weight_decay", "clip_norm"), NOT_NEGATIVE),
    **dict.fromkeys(("min_lr", "condense_until"), SHARE),
    "valid_fraction": Range(0, 1, above=True, below=True),
    "timeout_seconds": POSITIVE,
    "seed": SEED,
}  # fmt: skip


# Settings of a model that options call by the same name.
_NAMED_ALIKE = (
    "hidden_size", "expert_hidden_size", "dense_hidden_size", "latent_size", "moe_every", "max_sequence_length",
    "memory_length", "top_k", "normalize_topk", "balance_loss", "z_loss", "locality_loss", "seat_loss",
    "seat_loss_form", "num_groups", "top_k_groups", "bias_update_rate", "capacity_factor",
)  # fmt: skip


@dataclass(frozen=True)
class TrainOptions:
    """What `luffy train` was asked to do. None in a model setting means: as in the preset."""

    RANGES: ClassVar[dict[str, Range]] = RANGES
    INPUTS: ClassVar[tuple[str, ...]] = ("--data", "--tokenizer", "--start-weights")  # files and folders that are read

    recipe: str = option("luffy", "How rows are exchanged; `luffy recipes` lists them.", "Run")
    model: str = option("moe-gpt2-tiny", "Model preset; `luffy models` lists them.", "Run")
    ranks: int = option(1, "Local ranks to start (ignored under torchrun).", "Run")
    steps: int = option(200, "Optimizer steps in total, including those before a resume.", "Run")
    device: str = option("auto", "cpu, cuda, or auto.", "Run")
    backend: str = option("auto", "nccl, gloo, or auto: nccl where each rank has a GPU of its own.", "Run")
    out: str = option("runs/train", "Folder for metrics, checkpoints and the report.", "Run")
    seed: int = option(0, "Seed of the weights and of the order of the data.", "Run")
    resume: bool = option(False, "Continue from the newest checkpoint in --out.", "Run")
    overwrite: bool = option(False, "Replace a run that is already in --out.", "Run")
    ep_size: int | None = option(None, "Ranks that share one set of experts (default: all).", "Run")
    ranks_per_node: int | None = option(
        None, "Ranks on each node, to count bytes inside nodes and between them apart (default: torchrun's).", "Run"
    )
    topology: str | None = option(
        None, "Links of the expert-parallel group for planning, such as 2x4:intra=64gbit,inter=10gbit.", "Run"
    )
    timeout_seconds: float = option(
        600.0, "Seconds that ranks wait for another before the job ends and names it.", "Run"
    )
    interface: str | None = option(
        None,
        "Network interface that ranks listen on, such as eth1; its network must be trusted (default: the loopback "
        "where all ranks are on one machine).",
        "Run",
    )
    max_restarts: int = option(0, "Times that local ranks are started again when one is lost.", "Run")
    min_ranks: int | None = option(
        None, "Fewest ranks to restart with, after an attempt that wrote no new checkpoint (default: --ranks).", "Run"
    )

    data: str = option("stdlib", "File or folder of .txt, .jsonl[.gz], .parquet; or stdlib.", "Data")
    text_field: str = option("text", "Field that holds the text (.jsonl, .parquet).", "Data")
    tokenizer: str | None = option(
        None, "Tokenizer file (tokenizer.json); without it one is trained on the data.", "Data"
    )
    vocab_size: int | None = option(None, "Size of a trained tokenizer (default: the model's).", "Data")
    cache_dir: str | None = option(None, "Where token shards are kept (default ~/.cache/luffy).", "Data")
    valid_fraction: float = option(
        0.02, "Share of the documents to hold out, unless files are named valid or test.", "Data"
    )
    sequence_length: int | None = option(None, "Longest sequence (default: the model's).", "Data")
    sequence_mode: str = option(
        "documents", "What a sequence is: documents, fixed (all equally long), or streams.", "Data"
    )
    layout: str = option("packed", "Attention over packed or padded batches.", "Data")

    batch_size: int = option(32, "Sequences per optimizer step over all ranks.", "Training")
    accumulate: int = option(1, "Micro-batches per step.", "Training")
    overlap: bool = option(
        False,
        "Split each micro-batch in two halves that take turns: one computes while the rows of the other travel.",
        "Training",
    )
    lr: float = option(1e-3, "Peak learning rate.", "Training")
    min_lr: float = option(0.1, "Final learning rate, as a share of --lr.", "Training")
    warmup_steps: int | None = option(
        None, "Steps over which the learning rate rises (default: 5% of --steps, at most 200).", "Training"
    )
    weight_decay: float = option(0.1, "Weight decay, applied to matrices only.", "Training")
    clip_norm: float = option(1.0, "Largest global gradient norm; 0 turns clipping off.", "Training")
    dtype: str = option(
        "auto", "Type of the computation: bfloat16, float32, float64; auto: bfloat16 on GPUs, else float32.", "Training"
    )
    recompute: bool = option(False, "Recompute attention and experts in the backward pass.", "Training")
    gradient_dtype: str | None = option(
        None,
        f"Format in which ranks sum gradients: {', '.join(SUM_FORMATS)} (32, 16, 8.5 bits; default: the recipe's).",
        "Training",
    )
    eval_every: int = option(50, "Steps between held-out evaluations; 0: only at the end.", "Training")
    eval_batches: int = option(8, "Batches of --batch-size in each evaluation.", "Training")
    checkpoint_every: int = option(100, "Steps between checkpoints; 0: only at the end.", "Training")
    keep_checkpoints: int = option(2, "Checkpoints to keep; 0: write none.", "Training")
    async_checkpoints: bool = option(
        True, "Write checkpoints while training goes on, from a copy in the host's memory.", "Training"
    )
    skip_bad_steps: int = option(
        0, "Steps with a loss or gradient that is not finite to skip before the run stops.", "Training"
    )
    start_weights: str | None = option(
        None, "Begin from the model.safetensors of an earlier --export, at any number of ranks.", "Training"
    )
    export: bool = option(False, "Write model.safetensors at the end.", "Training")
    tensorboard: bool = option(True, "Write TensorBoard curves.", "Training")
    log: str | None = option(None, "Also log curves to wandb or mlflow; separate several by commas.", "Training")
    rehome_every: int | None = option(
        None, "Steps after which experts may move to other ranks; 0: never (default: the recipe's).", "Training"
    )
    profile_attention: bool = option(
        True,
        "Time attention at the start, for recipes that plan with it. Without, plans are the same in every run.",
        "Training",
    )
    seats: str | None = option(
        None,
        "Rank on which each sequence is computed: as-read (where it was read), learnt (where it is predicted, from its "
        "token ids, to send fewest rows), topic (where the experts of its topic are; use with --seat-loss) (default: "
        "the recipe's).",
        "Training",
    )
    wire: str | None = option(
        None,
        "Format of rows on links: model, bf16, int16, int8, int4, safe, aggressive, or DIRECTION=FORMAT,... "
        "for dispatch, combine, dispatch_backward, combine_backward. Suffix -sr: gradients are rounded stochastically. "
        "Suffix ,local: rows that stay on their rank are rounded too (default: the recipe's).",
        "Training",
    )
    residency: str | None = option(
        None,
        "Which ranks hold others' experts during a layer: static (none), fetch (those that chose them), shadow (all, "
        "of popular ones) (default: the recipe's).",
        "Training",
    )
    fetch_limit: str | None = option(
        None, "Most memory of a rank for experts of other ranks, such as 8GB (default: half of it).", "Training"
    )
    auto_every: int = option(
        200, "With --recipe auto: steps until modes are compared again; sooner if the speed changes.", "Training"
    )
    condense: str | None = option(
        None,
        "Let similar tokens share a row: none, static:0.9, paper, lsh:6, lsh-causal:6; suffixes: ,local ,window=N "
        ",correct (default: the recipe's).",
        "Training",
    )
    topics: int | None = option(
        None,
        "Number of topics; each has as many tokens as another, and its own experts (default: --ep-size).",
        "Training",
    )
    seat_loss_warmup: int = option(0, "Steps over which the seat loss grows to its weight.", "Training")
    condense_warmup: int = option(0, "Steps before condensation begins.", "Training")
    condense_until: float = option(1.0, "Share of the steps after which condensation ends.", "Training")
    trace_every: int = option(0, "Record routing in every n-th step, in OUT/trace; 0: never.", "Training")

    layers: int | None = option(None, "Number of blocks.", "Model")
    hidden_size: int | None = option(None, "Width of the residual stream.", "Model")
    heads: int | None = option(None, "Number of attention heads.", "Model")
    experts: int | None = option(None, "Experts per MoE layer.", "Model")
    top_k: int | None = option(None, "Experts per token.", "Model")
    expert_hidden_size: int | None = option(None, "Inner width of an expert.", "Model")
    dense_hidden_size: int | None = option(None, "Inner width of a dense block.", "Model")
    shared_experts: int | None = option(None, "Experts that every token uses.", "Model")
    latent_size: int | None = option(
        None, "Width to which tokens are projected before they go to routed experts; 0: no projection.", "Model"
    )
    moe_every: int | None = option(None, "Every n-th block has experts; the others are dense.", "Model")
    max_sequence_length: int | None = option(None, "Longest sequence the model can take.", "Model")
    memory_length: int | None = option(
        None,
        "Segment recurrence (moe-transformer-xl): states kept from the previous segment. Needs --sequence-mode streams "
        "and a recipe that leaves sequences on the rank that read them.",
        "Model",
    )
    router_score: str | None = option(None, "Score of the router: softmax or sigmoid.", "Model")
    normalize_topk: bool | None = option(
        None, "Scale the weights of the chosen experts so that they sum to one.", "Model"
    )
    balance_loss: float | None = option(None, "Weight of the load-balance loss.", "Model")
    z_loss: float | None = option(None, "Weight of the router z-loss.", "Model")
    locality_loss: float | None = option(
        None,
        "Weight of the loss that lets a sequence use few experts while all stay in use; 0: off; try 0.02.",
        "Model",
    )
    seat_loss: float | None = option(
        None,
        "Weight of the loss that moves tokens to experts on the rank of their sequence; 0: off; try 0.1.",
        "Model",
    )
    seat_loss_form: str | None = option(
        None, f"What the seat loss counts of what leaves the rank: {', '.join(SEAT_LOSS_FORMS)}.", "Model"
    )
    num_groups: int | None = option(None, "Groups of experts, of which a token uses --top-k-groups.", "Model")
    top_k_groups: int | None = option(None, "Groups of experts that a token may choose in.", "Model")
    bias_update_rate: float | None = option(None, "Rate of loss-free balancing; 0: off.", "Model")
    capacity_factor: float | None = option(None, "Drop choices beyond capacity (default: dropless).", "Model")

    def __post_init__(self) -> None:
        _one_of("--device", self.device, ("auto", "cpu", "cuda"))
        _one_of("--backend", self.backend, ("auto", "nccl", "gloo"))
        _one_of("--dtype", self.dtype, ("auto", *DTYPES))
        _one_of("--gradient-dtype", self.get_gradient_dtype(), SUM_FORMATS)
        check_log(self.log)
        _one_of("--layout", self.layout, ("packed", "padded"))
        _one_of("--sequence-mode", self.sequence_mode, ("documents", "fixed", "streams"))
        for name, allowed in self.RANGES.items():
            allowed.check(f"--{name.replace('_', '-')}", getattr(self, name))
        _require(
            self.start_weights is None or Path(self.start_weights).is_file(),
            f"--start-weights {self.start_weights}: no such file; name the model.safetensors of an earlier --export",
        )
        _require(not (self.resume and self.overwrite), "--resume and --overwrite exclude each other")
        _require(
            self.min_ranks is None or self.min_ranks <= self.ranks,
            f"--min-ranks {self.min_ranks} must be at most --ranks {self.ranks}",
        )
        keep_run_apart(self.out, {name: getattr(self, name[2:].replace("-", "_")) for name in self.INPUTS}, ("--data",))
        from luffy.compose import check  # with torch, which the command line does without

        recipe, config = self.get_recipe(), self.model_config()
        _require(
            self.sequence_length is None or self.sequence_length <= config.max_sequence_length,
            f"--sequence-length {self.sequence_length} is more than {config.name} allows "
            f"({config.max_sequence_length}); raise --max-sequence-length",
        )
        if config.memory_length:
            _require(
                not self.overlap, "--overlap cannot be combined with --memory-length: the halves depend on another"
            )
            _require(self.sequence_mode == "streams", "--memory-length needs --sequence-mode streams")
        if self.topology is not None:
            parse_topology(self.topology)
        check(recipe, config)
        self._check_seats(config)
        if self.fetch_limit is not None:
            parse_num_bytes(self.fetch_limit, "--fetch-limit")

    def _check_seats(self, config: ModelConfig) -> None:
        if self.seats is not None:
            _one_of("--seats", self.seats, SEATS)
        kind = self.get_recipe().seats
        _require(not self.topics or kind == "topic", f"--topics {self.topics} needs --seats topic")
        _require(
            not self.seat_loss or kind in ("topic", "learnt"),
            f"--seat-loss {self.seat_loss} needs seats that it can pull to: --seats topic for a new model, "
            "--seats learnt for a trained one",
        )
        if self.seats != "topic":
            return
        _require(
            not self.rehome_every, "--rehome-every: with --seats topic experts stay with their topics; leave it out"
        )
        _require(config.num_moe_layers > 0, "--seats topic needs a model with MoE layers")
        if self.topics is not None:
            E = config.router.num_experts
            _require(
                E % self.topics == 0,
                f"--topics {self.topics} must divide the {E} experts of a layer",
            )

    def num_topics(self, ep_size: int) -> int:
        """Topics of sequences; 0 without."""
        return 0 if self.seats != "topic" else self.topics or ep_size

    def seat_strength(self, step: int) -> float:
        """Factor of the seat loss at `step`, from 0."""
        return min(1.0, (step + 1) / (self.seat_loss_warmup + 1))

    @property
    def num_micro_batches(self) -> int:
        """Forward passes of a step."""
        return self.accumulate * (2 if self.overlap else 1)

    @property
    def num_eval_micro_batches(self) -> int:
        """Forward passes of an evaluation: how a batch is divided must not change which sequences are read."""
        return self.eval_batches * self.num_micro_batches

    def get_recipe(self) -> Recipe:
        recipe = get_recipe(self.recipe)
        recipe = recipe if self.wire is None else replace(recipe, wire=self.wire)
        recipe = recipe if self.seats is None else replace(recipe, seats=self.seats)
        recipe = recipe if self.residency is None else replace(recipe, residency=self.residency)
        return recipe if self.condense is None else replace(recipe, condense=self.condense)

    def get_gradient_dtype(self) -> str:
        """How gradients are written while ranks sum them."""
        return self.get_recipe().gradient_dtype if self.gradient_dtype is None else self.gradient_dtype

    @property
    def starts_trained(self) -> bool:
        """Whether routers have learnt before step 0."""
        return self.start_weights is not None

    def get_rehome_every(self) -> int:
        """Steps between re-homings of experts; 0 is never. Experts of topics stay where they are."""
        if self.seats == "topic":
            return 0
        return self.get_recipe().rehome_every if self.rehome_every is None else self.rehome_every

    def model_config(self) -> ModelConfig:
        """The preset with this run's changes."""
        return model_preset(self.model).override(
            num_layers=self.layers,
            num_heads=self.heads,
            num_experts=self.experts,
            num_shared_experts=self.shared_experts,
            score=self.router_score,
            **{name: getattr(self, name) for name in _NAMED_ALIKE},
        )

    def links(self) -> Topology | None:
        """The topology asked for, if any."""
        return None if self.topology is None else parse_topology(self.topology)

    def check_world(self, world_size: int) -> None:
        """What can only be checked once the number of ranks is known."""
        ep_size = world_size if self.ep_size is None else self.ep_size
        _require(
            ep_size >= 1 and world_size % ep_size == 0, f"--ep-size {ep_size} does not divide the {world_size} ranks"
        )
        self.model_config().check_ranks(ep_size)
        C = self.num_topics(ep_size)
        _require(
            not C or C % ep_size == 0 or ep_size % C == 0,
            f"--topics {C} must be a multiple or a divisor of the {ep_size} expert-parallel ranks",
        )
        links = self.links()
        _require(
            links is None or links.world_size == ep_size,
            f"--topology {self.topology} does not describe an expert-parallel group of {ep_size} ranks",
        )
        share = world_size * self.num_micro_batches
        halves = " x 2, for --overlap" if self.overlap else ""
        _require(
            self.batch_size % share == 0,
            f"--batch-size {self.batch_size} must be a multiple of ranks x --accumulate "
            f"({world_size} x {self.accumulate}{halves})",
        )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def groups() -> dict[str, list[Field[Any]]]:
    """Options by group, in order of appearance."""
    out: dict[str, list[Field[Any]]] = {}
    for f in fields(TrainOptions):
        out.setdefault(f.metadata["group"], []).append(f)
    return out
