"""The options of `luffy finetune`: those of `luffy train` that make sense for a given model, and a few of its own."""

from __future__ import annotations

from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, ClassVar

from luffy.config import ModelConfig, _one_of, _require
from luffy.data.corpus import list_source_files
from luffy.errors import UserError
from luffy.hf.freezing import FROZEN, frozen_patterns
from luffy.hf.hub import local_data, local_model
from luffy.hf.targets import TARGETS, check_targets
from luffy.hf.vocabulary import named_tokens
from luffy.ranges import AT_LEAST_ONE, COUNT, Range
from luffy.train.options import RANGES, TrainOptions, option

LONGEST_DEFAULT = 2048


@dataclass(frozen=True)
class FinetuneOptions(TrainOptions):
    """What `luffy finetune` was asked to do."""

    RANGES: ClassVar[dict[str, Range]] = RANGES | {
        "lora": COUNT,
        "lora_alpha": AT_LEAST_ONE,
        "valid_fraction": Range(0, 1, below=True),
    }
    INPUTS: ClassVar[tuple[str, ...]] = ("--data", "--validation", "--model")

    model: str = option("", "Folder of the model (config.json, safetensors, tokenizer), or its name on the hub.", "Run")
    recipe: str = option("luffy", "How rows are exchanged; `luffy recipes` lists them.", "Run")
    out: str = option("runs/finetune", "Folder for metrics, checkpoints, the report, and the model (OUT/model).", "Run")
    data: str = option(
        "",
        "File or folder of .jsonl[.gz], .json, .parquet or .txt, or a data set's name on the hub. Records: messages, "
        "ShareGPT, Alpaca, prompt and completion, or text.",
        "Data",
    )
    validation: str | None = option(
        None, "Held-out data, as --data (default: files named valid or test, else --valid-fraction).", "Data"
    )
    valid_fraction: float = option(
        0.02, "Share of the sequences to hold out when no file is given; 0: no evaluation.", "Data"
    )
    sequence_length: int | None = option(
        None, f"Longest sequence; texts are cut there (default: the model's, {LONGEST_DEFAULT} at most).", "Data"
    )
    loss_on: str = option(
        "auto",
        "Tokens of chats and completions to train on: all; assistant: answers, with an error where the chat template "
        "does not mark them; auto: answers, and such chats are left out.",
        "Data",
    )
    batch_size: int = option(8, "Sequences per optimizer step over all ranks.", "Training")
    lr: float = option(1e-5, "Peak learning rate.", "Training")
    weight_decay: float = option(0.0, "Weight decay, applied to matrices only.", "Training")
    lora: int = option(0, "Rank of LoRA adapters, with all else frozen; 0: train every weight.", "Training")
    lora_on: str = option("attention", f"What gets adapters, separated by commas: {', '.join(TARGETS)}.", "Training")
    lora_alpha: int = option(16, "Adapters are scaled by this over their rank.", "Training")
    dora: bool = option(False, "Adapters by magnitude and direction (DoRA), on attention.", "Training")
    freeze: str | None = option(
        None,
        f"What is not trained, separated by commas: {', '.join(FROZEN)}, or whole layers A-B, such as layers 0-11.",
        "Training",
    )
    new_tokens: str | None = option(
        None,
        "New tokens, with commas. Their rows in embedding and head begin as the mean of the others, and are trained "
        "with --lora too.",
        "Training",
    )
    dense: str = option(
        "replicated",
        "Attention, dense feed-forwards, embedding and head: replicated, or sharded over all ranks (FSDP2).",
        "Training",
    )
    export: bool = option(True, "Write OUT/model at the end.", "Training")
    verify_export: bool = option(
        True, "Open OUT/model again in plain transformers, and compare the logits of a batch.", "Training"
    )

    def __post_init__(self) -> None:
        _require(bool(self.model), "--model is missing: name the folder of a model")
        _require(bool(self.data), "--data is missing: name a file or a folder")
        object.__setattr__(self, "model", local_model(self.model))
        object.__setattr__(self, "data", local_data(self.data, "--data"))
        _require(Path(self.model).is_dir(), f"--model {self.model} is not a folder")
        list_source_files(self.data)
        if self.validation is not None:
            object.__setattr__(self, "validation", local_data(self.validation, "--validation"))
            try:
                list_source_files(self.validation)
            except UserError as error:
                raise UserError(str(error).replace("--data", "--validation", 1)) from error
        _one_of("--loss-on", self.loss_on, ("auto", "assistant", "all"))
        _one_of("--dense", self.dense, ("replicated", "sharded"))
        _require(
            self.dense == "replicated" or self.get_gradient_dtype() == "model",
            f"--gradient-dtype {self.get_gradient_dtype()} cannot be combined with --dense sharded, which sums "
            "gradients as they are; use --gradient-dtype model",
        )
        _require(
            self.lora > 0 or (self.lora_on == "attention" and not self.dora),
            "--lora-on and --dora need --lora, the rank of the adapters",
        )
        if self.lora:
            check_targets(self.lora_targets, self.dora, self.dense == "sharded")
        if self.new_tokens is not None:
            named_tokens(self.new_tokens)
            _require(
                not (self.lora and self.dense == "sharded"),
                "--new-tokens with --lora needs a whole embedding: leave --dense sharded out",
            )
        if self.freeze is not None:
            _require(not self.lora, "--freeze cannot be combined with --lora, which freezes all but its adapters")
            frozen_patterns(self.freeze)
        super().__post_init__()

    @property
    def starts_trained(self) -> bool:
        return True

    def model_config(self) -> ModelConfig:
        """The model in the folder, as planner and checkpoints know it; UserError for one that cannot be trained."""
        try:
            from luffy.hf.describe import describe
            from luffy.hf.families import family_of
            from luffy.hf.loading import read_config
        except ImportError as error:
            raise UserError(
                f"luffy finetune needs transformers and peft ({error}): pip install 'luffy-moe[hf]'"
            ) from error
        config = read_config(self.model)
        return describe(config, family_of(config), (), **self.router_losses())

    def router_losses(self) -> dict[str, Any]:
        return {n: getattr(self, n) for n in _LOSSES if getattr(self, n) is not None}

    @property
    def lora_targets(self) -> tuple[str, ...]:
        return tuple(name.strip() for name in self.lora_on.split(","))

    def longest(self) -> int:
        return self.sequence_length or min(LONGEST_DEFAULT, self.model_config().max_sequence_length)


# What the command line shows: a given model has its sizes, and its tokenizer is in its folder.
_LOSSES = ("balance_loss", "z_loss", "locality_loss", "seat_loss", "seat_loss_form", "bias_update_rate")
_HIDDEN = ("tokenizer", "vocab_size", "cache_dir", "sequence_mode",
           "condense", "condense_warmup", "condense_until")  # fmt: skip
SHOWN = {f.name for f in fields(FinetuneOptions) if f.metadata["group"] != "Model"}.difference(_HIDDEN).union(_LOSSES)
