"""transformers.Trainer around a model whose experts are spread over ranks: three lines differ from a plain script.

    torchrun --nproc-per-node 2 examples/hf_trainer.py --model FOLDER --out runs/hf-trainer

`accelerate launch` does as well. In one process (`python examples/hf_trainer.py --plain ...`) the same script trains
the plain model: its losses are those of the parallel one.
"""

import argparse
import json
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

import luffy.hf  # line 1


def pieces(text, length=64, held_out=14):
    """A text's bytes, cut into pieces: (those to train on, those that are held out)."""
    tokens = torch.tensor(list(text[: len(text) // length * length])).view(-1, length)
    rows = [{"input_ids": piece, "labels": piece} for piece in tokens]
    return rows[held_out:], rows[:held_out]


def settings(o):
    return TrainingArguments(
        str(o.out), max_steps=o.steps, per_device_train_batch_size=o.rows, per_device_eval_batch_size=o.rows,
        gradient_accumulation_steps=o.accumulate, learning_rate=1e-3, weight_decay=0.01, logging_steps=1,
        eval_strategy="steps", eval_steps=o.save_steps, save_strategy="steps", save_steps=o.save_steps,
        load_best_model_at_end=o.best, report_to="none", use_cpu=not torch.cuda.is_available(), bf16=o.bf16,
        disable_tqdm=True,
    )  # fmt: skip


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--save-steps", type=int, default=10)
    parser.add_argument("--dense", default="replicated", choices=("replicated", "sharded"))
    for flag in ("--bf16", "--best", "--resume", "--plain"):
        parser.add_argument(flag, action="store_true")
    o = parser.parse_args()
    if o.plain:
        model, trainer_class = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32), Trainer
    else:
        model = luffy.hf.load(o.model, dtype=torch.float32, dense=o.dense)  # line 2
        trainer_class = luffy.hf.trainer_of(Trainer)  # line 3
    train, held_out = pieces(Path(json.__file__).read_bytes())
    trainer = trainer_class(model, settings(o), train_dataset=train, eval_dataset=held_out)
    trainer.train(resume_from_checkpoint=o.resume or None)
    print(json.dumps(trainer.evaluate()["eval_loss"]))
    trainer.save_model(str(o.out / "model"))
    if trainer.is_world_process_zero():
        (o.out / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
