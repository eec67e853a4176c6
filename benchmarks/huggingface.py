"""What does a fine-tuning step cost here, and in transformers' own expert parallelism?

    python benchmarks/huggingface.py --out FILE.json
    luffy lab --ranks 4 --link 1gbit -- python benchmarks/huggingface.py --out FILE.json       (emulated links; root)

One Mixture-of-Experts of OLMoE's shape (random weights, 4 layers of 512/512, 32 experts, top-8), the same sequences, on
4 CPU ranks (gloo over loopback, not shaped, or behind the links of a lab), float32, forward and backward, gradients of
replicated weights summed. Recipes of Luffy, and `transformers`: its native expert parallelism,
`ep_implementation="all_to_all"`. Reported: bytes of token rows and experts that left a rank per token (Luffy's meter;
transformers counts none: it sends a row for each (token, expert) pair, as `vanilla` does), seconds a step (median and
quartiles after warm-up), and the loss, which is the same function everywhere. Routers are random, so sequences have no
favourite rank: `luffy` can gain little here.
"""

import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from transformers import AutoModelForCausalLM, OlmoeConfig

from luffy.comm import build_mesh
from luffy.comm.meter import by_direction
from luffy.hf import load
from luffy.lab.place import current_lab
from luffy.testing import run_ranks
from luffy.train.gradients import GradientSync
from luffy.train.metrics import describe_machine

RANKS, ROWS, LENGTH, WARM_UP = 4, 4, 128, 3
RECIPES = ("vanilla", "vanilla_dedup", "janus", "luffy")
DIRECTIONS = ("dispatch", "combine", "dispatch_backward", "combine_backward", "experts")


def batch(rank: int, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    return torch.randint(0, 4096, (ROWS, LENGTH), generator=generator)


def with_luffy(rank: int, folder: str, recipe: str, steps: int) -> list[tuple[float, float, float]]:
    """Loss of all ranks, seconds, and bytes per token that this rank sent, of each step."""
    model = load(folder, build_mesh(torch.device("cpu")), recipe)
    comm = model.runtime.comm
    sync, out = GradientSync(model, comm), []
    for step in range(steps):
        ids = batch(rank, step)
        comm.meter.take()
        dist.barrier()
        begin = time.perf_counter()
        loss = sync(model.batch(ids, labels=ids)).loss
        loss.backward()
        sync.finish()
        dist.barrier()
        seconds = time.perf_counter() - begin
        sent = comm.meter.take()
        rows = sum(by_direction(sent)[d] for d in DIRECTIONS)
        out.append((float(comm.all_reduce(loss.detach().clone())), seconds, rows / ids.numel()))
        model.zero_grad()
    return out


def with_transformers(rank: int, folder: str, steps: int) -> list[tuple[float, float, float]]:
    """The same of transformers' own expert parallelism; it does not count bytes."""
    from transformers.distributed import DistributedConfig

    if "MASTER_ADDR" not in os.environ:
        os.environ |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "29511"}
    config = DistributedConfig(fsdp_size=RANKS, ep_size=RANKS, ep_implementation="all_to_all")
    model = AutoModelForCausalLM.from_pretrained(folder, distributed_config=config).train()
    out = []
    for step in range(steps):
        ids = batch(rank, step)
        dist.barrier()
        begin = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        dist.barrier()
        seconds = time.perf_counter() - begin
        mean = loss.detach().clone()
        dist.all_reduce(mean)
        out.append((float(mean) / RANKS, seconds, float("nan")))
        model.zero_grad()
    return out


def summary(name: str, of_ranks: list[list[tuple[float, float, float]]]) -> dict[str, object]:
    steps = np.array(of_ranks)[:, WARM_UP:]  # [ranks, steps, 3]
    seconds = steps[:, :, 1].max(0)
    return {
        "system": name,
        "loss": float(steps[0, -1, 0]),
        "bytes_per_token": None if name == "transformers" else float(np.median(steps[:, :, 2].mean(0))),
        "seconds": [float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75)],
    }


def on_ranks(work: Callable[..., Any], *args: Any) -> list[Any]:
    """`work(rank, *args)` on four ranks of its own, or on those that a lab or torchrun has started: all results."""
    if "RANK" not in os.environ:
        return run_ranks(work, RANKS, *args)
    results: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(results, work(dist.get_rank(), *args))
    return results


@click.command()
@click.option("--steps", default=12, show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(steps: int, out: Path) -> None:
    """Measure all systems, write JSON."""
    config = OlmoeConfig(
        vocab_size=4096, hidden_size=512, intermediate_size=512, num_hidden_layers=4, num_attention_heads=8,
        num_key_value_heads=8, eos_token_id=None, num_experts=32, num_experts_per_tok=8, max_position_embeddings=LENGTH,
    )  # fmt: skip
    first = os.environ.get("RANK", "0") == "0"
    if "RANK" in os.environ:
        torch.set_num_threads(1)
        dist.init_process_group("gloo")
        if dist.get_world_size() != RANKS:
            raise click.ClickException(f"give it {RANKS} ranks")
    with tempfile.TemporaryDirectory() as own:
        folder = [own]
        if first:
            torch.manual_seed(0)
            AutoModelForCausalLM.from_config(config).save_pretrained(own)
        if dist.is_initialized():
            dist.broadcast_object_list(folder)
        rows = [summary(recipe, on_ranks(with_luffy, folder[0], recipe, steps)) for recipe in RECIPES]
        rows.append(summary("transformers", on_ranks(with_transformers, folder[0], steps)))
        if dist.is_initialized():
            dist.barrier()
    if not first:
        return
    out.parent.mkdir(parents=True, exist_ok=True)
    lab = current_lab()
    network = {"provenance": "emulated", "network": lab.network} if lab else {"provenance": "measured"}
    about = describe_machine("cpu") | network
    out.write_text(json.dumps({"environment": about, "cpu_ranks": RANKS, "rows": rows}, indent=1))
    for r in rows:
        low, mid, high = r["seconds"]
        sent = "not counted" if r["bytes_per_token"] is None else f"{r['bytes_per_token'] / 1e3:.2f} kB/token"
        click.echo(f"{r['system']:<14} {sent:>16}  {mid:.3f} s [{low:.3f}, {high:.3f}]  loss {r['loss']:.6f}")


if __name__ == "__main__":
    main()
