"""transformers.Trainer around a model whose experts are spread over ranks.

    torchrun --nproc-per-node 2 examples/hf_trainer.py --out runs/hf-trainer

Trainer keeps its loop, data loader, schedule, logging, evaluation and callbacks. Three things are Luffy's, because
gradients are *sums* over ranks here: what wraps the model (DistributedDataParallel, which Trainer would use, averages,
and experts too), the loss (each rank's share of the mean over all labels), and the norm that gradients are clipped to
(experts are on other ranks).

Not to be used: Trainer's checkpoints and `save_model`, which would hold one rank's experts (`save_strategy="no"`, and
`luffy.hf.save_pretrained` at the end), `fsdp`, `deepspeed`, fp16, `compute_metrics` and `label_smoothing_factor`.
"""

import argparse
import json
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn
from transformers import AutoModelForCausalLM, MixtralConfig, Trainer, TrainingArguments

import luffy
import luffy.hf
from luffy.train.gradients import GradientSync, make_optimizer


class Summed(nn.Module):
    """A parallel model as Trainer calls it. These two have it count the labels predicted by all ranks in a step."""

    accepts_loss_kwargs, loss_type = True, "ForCausalLM"

    def __init__(self, parallel):
        super().__init__()
        self.parallel, self.sync, self.last = parallel, GradientSync(parallel, parallel.runtime.comm), True

    def forward(self, input_ids, labels, attention_mask=None, num_items_in_batch=None, micro_batches=1):
        """This rank's share of the mean loss."""
        batch = self.parallel.batch(input_ids, attention_mask, labels)
        if not self.training:
            return self.parallel(batch).token_loss
        tokens = batch.num_tokens * micro_batches  # which weigh alike in a balance loss
        return self.sync(replace(batch, step_labels=int(num_items_in_batch), step_tokens=tokens), last=self.last).loss

    @contextmanager
    def no_sync(self):  # as DistributedDataParallel's, around all micro-batches but the last
        self.last = False
        yield
        self.last = True


class LuffyTrainer(Trainer):
    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        self.accelerator.prepare_model = lambda model, **_: model

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if model.training:
            parts = self.current_gradient_accumulation_steps
            return model(**inputs, num_items_in_batch=num_items_in_batch, micro_batches=parts)
        loss = model(**inputs) * self.args.world_size  # since the mean over ranks is shown
        return (loss, (loss, None)) if return_outputs else loss

    def training_step(self, *arguments, **options):
        loss = super().training_step(*arguments, **options)
        if self.accelerator.sync_gradients:
            self.model.sync.finish()
        return loss * self.args.world_size

    def _clip_grad_norm(self, model):
        return self.model.sync.clip(self.args.max_grad_norm)


def pieces(text, length=64, held_out=64):
    """A text's bytes, cut into pieces: (those to train on, those that are held out)."""
    tokens = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    rows = [{"input_ids": piece, "labels": piece} for piece in tokens]
    return rows[held_out:], rows[:held_out]


def tiny_model():
    """The same random weights on every rank. (Of a folder: `luffy.hf.load(folder, mesh)`.)"""
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        MixtralConfig(vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
                      num_key_value_heads=2, num_local_experts=4, max_position_embeddings=64)
    )  # fmt: skip


def settings(out, steps, rows, parts):
    return TrainingArguments(
        str(out), max_steps=steps, per_device_train_batch_size=rows, gradient_accumulation_steps=parts, logging_steps=1,
        eval_strategy="steps", eval_steps=steps, save_strategy="no", report_to="none", use_cpu=True,
        disable_tqdm=True, remove_unused_columns=False, label_names=["labels"], prediction_loss_only=True,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--dense", default="replicated", choices=("replicated", "sharded"))
    o = parser.parse_args()
    mesh = luffy.join_world()
    model = luffy.hf.parallelize(tiny_model(), mesh, recipe="luffy", dense=o.dense)
    train, held_out = pieces(Path(json.__file__).read_bytes())
    trainer = LuffyTrainer(
        Summed(model), settings(o.out, o.steps, 4, o.accumulate), train_dataset=train, eval_dataset=held_out,
        optimizers=(make_optimizer(model, 1e-3, 0.01, fused=False), None),
    )  # fmt: skip
    trainer.train()
    luffy.hf.save_pretrained(model, o.out / "model")
    if mesh.rank == 0:
        (o.out / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
