"""TRL's SFTTrainer around a model whose experts are spread over ranks: three lines differ from a plain script.

    torchrun --nproc-per-node 2 examples/trl_sft.py --model FOLDER --data chats.jsonl --out runs/sft

Packing, padding-free batches, completion-only loss and chat templates are TRL's own. `--plain` trains the plain model
in one process. `--lora` adapts attention and experts.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import load_dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import SFTConfig, SFTTrainer

import luffy.hf  # line 1


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", required=True)
    parser.add_argument("--data", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rows", type=int, default=4)
    parser.add_argument("--lora", type=int, default=0)
    for flag in ("--packing", "--plain"):
        parser.add_argument(flag, action="store_true")
    o = parser.parse_args()
    args = SFTConfig(
        str(o.out), max_steps=o.steps, per_device_train_batch_size=o.rows, learning_rate=1e-3, max_length=64,
        packing=o.packing, logging_steps=1, save_strategy="no", report_to="none", bf16=False,
        use_cpu=not torch.cuda.is_available(), disable_tqdm=True,
    )  # fmt: skip
    if o.plain:
        model, trainer_class = AutoModelForCausalLM.from_pretrained(o.model, dtype=torch.float32), SFTTrainer
        if o.lora:
            torch.manual_seed(0)
            targets = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
            config = LoraConfig(r=o.lora, lora_alpha=16, target_modules=["q_proj"], target_parameters=targets)
            model = get_peft_model(model, config)
    else:
        model = luffy.hf.load(o.model, dtype=torch.float32)  # line 2
        trainer_class = luffy.hf.trainer_of(SFTTrainer)  # line 3
        if o.lora:
            model.adapt(o.lora, on=("attention", "experts"))
    data = load_dataset("json", data_files=o.data, split="train")
    trainer = trainer_class(model, args, train_dataset=data, processing_class=AutoTokenizer.from_pretrained(o.model))
    trainer.train()
    trainer.save_model(str(o.out / "model"))
    if trainer.is_world_process_zero():
        (o.out / "log.json").write_text(json.dumps(trainer.state.log_history))


if __name__ == "__main__":
    main()
