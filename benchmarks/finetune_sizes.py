"""Published sizes on one GPU: a training step of Luffy beside transformers with PEFT (grouped_mm), on the same weights.

    python benchmarks/finetune_sizes.py --shape qwen3-30b-a3b                  # LoRA on attention and experts
    python benchmarks/finetune_sizes.py --shape olmoe-1b-7b --full
    python benchmarks/finetune_sizes.py --shape gpt-oss-20b

Weights are random and made on the device, each system in a process of its own, so that neither's memory is seen by the
other; they take turns (A B A B). Both compute in bfloat16, attention by SDPA (GPT-OSS: eager), recompute activations
unless told not to, and step AdamW over what is trained. Printed and written: tokens a second (quartiles over steps of
all turns), peak memory, the loss of the first step, which must agree. `--shape tiny --device cpu` tries the script.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from torch import nn

from luffy.train.metrics import describe_machine, write_json_atomic

SYSTEMS = ("luffy", "transformers")
ATTENTION = {"gpt-oss-20b": "eager"}  # its sinks are not known to SDPA


def config_of(shape: str) -> Any:
    """The configuration of a published model, as its config.json has it."""
    from transformers import GptOssConfig, OlmoeConfig, Qwen3MoeConfig

    if shape == "qwen3-30b-a3b":
        return Qwen3MoeConfig(
            vocab_size=151936, hidden_size=2048, intermediate_size=6144, moe_intermediate_size=768,
            num_hidden_layers=48, num_attention_heads=32, num_key_value_heads=4, head_dim=128, num_experts=128,
            num_experts_per_tok=8, norm_topk_prob=True, max_position_embeddings=40960, decoder_sparse_step=1,
            mlp_only_layers=[],
        )  # fmt: skip
    if shape == "olmoe-1b-7b":
        return OlmoeConfig(
            vocab_size=50304, hidden_size=2048, intermediate_size=1024, num_hidden_layers=16, num_attention_heads=16,
            num_key_value_heads=16, num_experts=64, num_experts_per_tok=8, norm_topk_prob=False,
            max_position_embeddings=4096,
        )  # fmt: skip
    if shape == "gpt-oss-20b":
        return GptOssConfig(
            vocab_size=201088, hidden_size=2880, intermediate_size=2880, num_hidden_layers=24, num_attention_heads=64,
            num_key_value_heads=8, head_dim=64, num_local_experts=32, num_experts_per_tok=4,
            rope_parameters={"rope_type": "default", "rope_theta": 150000.0},
        )  # fmt: skip
    assert shape == "tiny"
    return Qwen3MoeConfig(
        vocab_size=256, hidden_size=64, intermediate_size=96, moe_intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=16, num_experts=8, num_experts_per_tok=2,
        mlp_only_layers=[],
    )  # fmt: skip


@torch.no_grad()
def fill(model: nn.Module) -> None:
    """Random weights, the same by name for both systems."""
    for name, p in sorted(model.named_parameters()):
        if "lora_" in name:
            continue
        plain = name.replace("library.", "").replace("router.gate.", "gate.").replace(".base_layer.", ".")
        plain = plain.replace("base_model.model.", "").replace("parallel.", "").replace("gate.", "router.")
        generator = torch.Generator(p.device).manual_seed(sum(map(ord, plain)))
        if "norm" in name:
            p.fill_(1)
        elif name.endswith(("bias", "sinks")):
            p.zero_()
        else:
            p.normal_(0, 0.02, generator=generator)


def luffy_model(config: Any, device: torch.device, lora: int, recompute: bool, attention: str) -> tuple[Any, Any]:
    from transformers import AutoModelForCausalLM

    from luffy.comm import build_mesh
    from luffy.hf import CausalLM, parallelize
    from luffy.hf.loading import _materialise

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    parallel = parallelize(model, build_mesh(device), "vanilla_dedup", recompute=recompute)
    _materialise(parallel, device)
    fill(parallel)
    if lora:
        parallel.adapt(lora, on=("attention", "experts"))
    view = CausalLM(parallel).train()

    def backward(ids: torch.Tensor) -> torch.Tensor:
        loss = view(ids, labels=ids).loss
        loss.backward()
        view.sync.finish()
        return loss.detach()

    return view, backward


def transformers_model(
    config: Any, device: torch.device, lora: int, recompute: bool, attention: str
) -> tuple[Any, Any]:
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    with device:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16, attn_implementation=attention, experts_implementation="grouped_mm"
        )
    fill(model)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if lora:
        torch.manual_seed(0)
        block = "mlp.experts."
        model = get_peft_model(model, LoraConfig(
            r=lora, lora_alpha=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"],
            target_parameters=[f"{block}gate_up_proj", f"{block}down_proj"], task_type="CAUSAL_LM",
        ))  # fmt: skip
        model.enable_input_require_grads()
    model.train()

    def backward(ids: torch.Tensor) -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        return loss.detach()

    return model, backward


def work(system: str, o: dict[str, Any]) -> dict[str, Any]:
    """One turn of one system: seconds of each step, peak memory, first loss."""
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    device, cuda = torch.device(o["device"], 0) if o["device"] == "cuda" else torch.device("cpu"), o["device"] == "cuda"
    with tempfile.TemporaryDirectory() as folder:
        torch.distributed.init_process_group(
            "nccl" if cuda else "gloo", init_method=f"file://{folder}/store", rank=0, world_size=1
        )
        make = luffy_model if system == "luffy" else transformers_model
        begin = time.perf_counter()
        lora, attention = 0 if o["full"] else o["lora"], ATTENTION.get(o["shape"], "sdpa")
        model, backward = make(config_of(o["shape"]), device, lora, o["recompute"], attention)
        made = time.perf_counter() - begin
        trained = [p for p in model.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, fused=cuda)
        weights = torch.cuda.memory_allocated() if cuda else 0
        seconds, first = [], None
        for step in range(o["warmup"] + o["steps"]):
            generator = torch.Generator().manual_seed(step)
            vocabulary = config_of(o["shape"]).vocab_size
            ids = torch.randint(0, vocabulary, (o["rows"], o["length"]), generator=generator).to(device)
            if cuda:
                torch.cuda.synchronize()
            begin = time.perf_counter()
            loss = backward(ids)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            if cuda:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - begin)
            first = float(loss) if first is None else first
        peak = torch.cuda.max_memory_allocated() if cuda else 0
        torch.distributed.destroy_process_group()
    return {
        "seconds": seconds[o["warmup"] :], "peak_memory_bytes": peak, "memory_before_bytes": weights, "loss": first,
        "trained_parameters": sum(p.numel() for p in trained), "seconds_to_make": made,
        "parameters": sum(p.numel() for p in model.parameters()),
    }  # fmt: skip


def table(systems: dict[str, Any]) -> str:
    lines = ["| system | tokens/s | peak memory, GB | trained, millions | loss |", "|---|---|---|---|---|"]
    for name, s in systems.items():
        low, middle, high = s["tokens_per_second"]
        lines.append(
            f"| {name} | {middle:,.0f} [{low:,.0f}, {high:,.0f}] | {s['peak_memory_bytes'] / 1e9:.1f} | "
            f"{s['trained_parameters'] / 1e6:.1f} | {s['loss']:.4f} |"
        )
    return "\n".join(lines)


@click.command()
@click.option("--shape", type=click.Choice(["qwen3-30b-a3b", "olmoe-1b-7b", "gpt-oss-20b", "tiny"]), required=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cuda", show_default=True)
@click.option("--full", is_flag=True, help="Train every weight, bfloat16 weights and moments.")
@click.option("--lora", default=16, show_default=True, help="Rank of adapters on attention and experts.")
@click.option("--rows", default=2, show_default=True, help="Sequences a step.")
@click.option("--length", default=2048, show_default=True)
@click.option("--recompute/--no-recompute", default=True, show_default=True)
@click.option("--steps", default=6, show_default=True)
@click.option("--warmup", default=2, show_default=True)
@click.option("--turns", default=2, show_default=True, help="A B A B ...")
@click.option("--out", type=click.Path(path_type=Path), help="JSON (default: docs/results/finetune-sizes-SHAPE.json).")
@click.option("--worker", type=click.Choice(SYSTEMS), hidden=True)
def main(out: Path | None, worker: str | None, turns: int, **o: Any) -> None:
    """Measure both systems, write JSON, print a table."""
    if worker is not None:
        assert out is not None
        out.write_text(json.dumps(work(worker, o)))
        return
    out = out or Path(f"docs/results/finetune-sizes-{o['shape']}{'-full' if o['full'] else ''}.json")
    found: dict[str, list[dict[str, Any]]] = {name: [] for name in SYSTEMS}
    failures: dict[str, str] = {}
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "turn.json"
        for _ in range(turns):
            for name in SYSTEMS:
                if name in failures:
                    continue
                command = [sys.executable, str(Path(__file__)), *sys.argv[1:], "--worker", name, "--out", str(target)]
                done = subprocess.run(command, stderr=subprocess.PIPE, text=True, check=False)
                if done.returncode:
                    failures[name] = done.stderr.strip().splitlines()[-1][:300]
                    click.echo(f"{name}: {failures[name]}", err=True)
                    continue
                found[name].append(json.loads(target.read_text()))
    tokens = o["rows"] * o["length"]
    systems: dict[str, Any] = {}
    for name, runs in found.items():
        if runs:
            rates = tokens / np.array([s for run in runs for s in run["seconds"]])
            systems[name] = runs[0] | {
                "seconds": [run["seconds"] for run in runs],
                "peak_memory_bytes": max(run["peak_memory_bytes"] for run in runs),
                "tokens_per_second": np.quantile(rates, (0.25, 0.5, 0.75)).tolist(),
            }
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out, {"settings": o | {"turns": turns}, "environment": describe_machine(o["device"]),
                            "measured": systems, "failures": failures})  # fmt: skip
    click.echo(
        f"\n{o['shape']}, {'every weight' if o['full'] else 'LoRA'}, {tokens} tokens a step\n\n{table(systems)}\n"
    )
    if len(systems) == len(SYSTEMS):
        ratio = systems["luffy"]["tokens_per_second"][1] / systems["transformers"]["tokens_per_second"][1]
        click.echo(f"luffy over transformers: {ratio:.2f} times the tokens a second")
        losses = [s["loss"] for s in systems.values()]
        if np.ptp(losses) > 2e-2 * losses[0]:
            raise click.ClickException(f"the losses differ ({losses}): systems did not compute the same")


if __name__ == "__main__":
    main()
