"""`luffy finetune`: the trainer of `luffy train` with a model from a folder, its tokenizer, and a folder at the end."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import torch

from luffy.hf.adapters import save_adapter
from luffy.hf.freezing import freeze
from luffy.hf.loading import load
from luffy.hf.memory import memory_line
from luffy.hf.model import ParallelModel
from luffy.hf.options import FinetuneOptions
from luffy.hf.saving import save_pretrained
from luffy.hf.text import ExampleLoader, Examples, divide, prepare_examples
from luffy.hf.vocabulary import add_tokens, named_tokens, open_tokenizer
from luffy.train import run
from luffy.train.checkpoint import everyone
from luffy.train.progress import phase
from luffy.train.trainer import Trainer


def start(options: FinetuneOptions) -> None:
    """Run `luffy finetune`. Raises UserError before any rank starts for whatever can be seen by then."""
    run.start(options, _rank)


def _rank(options: FinetuneOptions) -> None:
    adapter = {"adapter": Path(options.out) / "adapter"} if options.lora else {}
    run.train_and_report(FineTuner, options, model=Path(options.out) / "model", **adapter)


class FineTuner(Trainer):
    """One rank's part in a fine-tuning run. What is trained is in float32 (or float64); rows, and frozen weights, in
    --dtype."""

    options: FinetuneOptions
    model: ParallelModel

    def _check_memory(self) -> None:
        """Left to `load`, which knows every weight."""

    def _load_data(self) -> None:
        o, mesh = self.options, self.mesh
        config, self.mask_id = o.model_config(), None
        folder = self.out / "tokens"

        def prepare() -> tuple[str, list[int]]:
            tokenizer = open_tokenizer(o.model)
            new = add_tokens(tokenizer, named_tokens(o.new_tokens)) if o.new_tokens else []
            if new:
                tokenizer.save_pretrained(self.out / "tokenizer")
            return prepare_examples(
                o.data, tokenizer, folder, sequence_length=o.longest(), loss_on=o.loss_on,
                vocab_size=max([config.vocab_size, *(i + 1 for i in new)]),
                validation=o.validation, text_field=o.text_field,
            ), new  # fmt: skip

        with phase("prepare data", enabled=mesh.rank == 0):
            summary, self.new_ids = everyone(mesh, prepare, only_first=True)
        self.config = replace(config, vocab_size=max([config.vocab_size, *(i + 1 for i in self.new_ids)]))
        if mesh.rank == 0:
            click.echo(summary, err=True)
        self.vocabulary = str(json.loads((folder / "about.json").read_text(encoding="utf-8"))["tokenizer"])
        examples = Examples(folder)
        train, valid = divide(examples, o.valid_fraction, o.seed)
        self.loader: Any = ExampleLoader(examples, train, self.micro_size, o.seed)
        self.valid_loader: Any = ExampleLoader(examples, valid, self.micro_size, o.seed) if len(valid) else None

    def _build_model(self) -> ParallelModel:
        o, stream = self.options, getattr(torch, self.dtype_name)
        weights = stream if o.lora else torch.promote_types(stream, torch.float32)
        with phase("load model", enabled=self.mesh.rank == 0):
            parallel = load(
                o.model, self.mesh, o.get_recipe(), dtype=weights, stream_dtype=stream, recompute=o.recompute,
                topology=self._links(), dense=o.dense, vocab_size=self.config.vocab_size, **o.router_losses(),
            )  # fmt: skip
        if self.new_ids:
            parallel.tokenizer = self.out / "tokenizer"
        if o.lora:
            parallel.adapt(o.lora, alpha=o.lora_alpha, seed=o.seed, on=o.lora_targets, dora=o.dora, tokens=self.new_ids)
        if o.freeze is not None:
            freeze(parallel, o.freeze)
        self.comm = parallel.runtime.comm
        if self.mesh.rank == 0:
            tokens = self.micro_size // self.mesh.world_size * o.longest()
            click.echo(memory_line(parallel, tokens), err=True)
        return parallel.train()

    @torch.no_grad()
    def evaluate(self, micro_batches: int | None = None) -> float:
        self.model.eval()
        try:
            return super().evaluate(micro_batches)
        finally:
            self.model.train()

    def _export(self) -> None:
        if not self.options.export:
            return
        save_pretrained(self.model, self.out / "model", verify=self.options.verify_export)
        if self.options.lora:
            save_adapter(self.model, self.out / "adapter")
