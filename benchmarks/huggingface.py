"""What does a fine-tuning step cost here, and in transformers' own expert parallelism?

    python benchmarks/huggingface.py                                 4 CPU ranks: loopback, and behind links of 1 Gb/s
    python benchmarks/huggingface.py --device cuda --ranks 2         a GPU a rank: NVLink, and NCCL held to sockets

One Mixture-of-Experts of OLMoE's shape with random weights, the same sequences for all, forward and backward, gradients
of replicated weights summed; no optimizer step, so that the loss of each step is the same everywhere (compared: the
command fails where they differ). Systems are recipes of Luffy, one of them with dense weights sharded as well, and
transformers: `ep_implementation="all_to_all"`, which shards dense weights with FSDP2.

All live in the same ranks, and each round every one makes a step, in an order that rotates. Reported: seconds a step,
of the slowest rank (median and quartiles over rounds); bytes that left a rank per token of it, those of token rows and
experts, and those of gradients and gathered weights (Luffy's meter; for transformers what benchmarks/peers counts at
its collectives, volumes by the same rules). Routers are random, so sequences have no favourite rank: `luffy` can gain
little here. The emulated links need root; without it loopback is measured alone, and the command says so.
"""

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
import torch.distributed as dist
from compare_tools import SOCKETS
from transformers import AutoModelForCausalLM, OlmoeConfig
from transformers.utils import logging

import luffy
from luffy.comm import Mesh
from luffy.comm.meter import by_direction
from luffy.hf import load
from luffy.lab.namespace import missing_capabilities
from luffy.lab.place import current_lab
from luffy.train.gradients import GradientSync
from luffy.train.metrics import describe_machine, write_json_atomic

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from benchmarks.peers.counting import ByteCounter
from benchmarks.peers.reduce_scatter import sum_over_gloo

WARM_UP = 2
# Luffy's: recipe, and what becomes of dense weights.
SYSTEMS = {
    "vanilla": ("vanilla", "replicated"),
    "vanilla_dedup": ("vanilla_dedup", "replicated"),
    "vanilla_dedup, dense sharded": ("vanilla_dedup", "sharded"),
    "luffy": ("luffy", "replicated"),
}
ROWS = ("dispatch", "combine", "dispatch_backward", "combine_backward", "experts")
LINK = "1gbit"


@dataclass(frozen=True)
class Shape:
    """Of the model, and of a rank's batch."""

    width: int
    expert_width: int
    layers: int
    experts: int
    vocabulary: int
    rows: int
    length: int

    def config(self) -> OlmoeConfig:
        return OlmoeConfig(
            vocab_size=self.vocabulary, hidden_size=self.width, intermediate_size=self.expert_width,
            num_hidden_layers=self.layers, num_attention_heads=8, num_key_value_heads=8, eos_token_id=None,
            num_experts=self.experts, num_experts_per_tok=8, max_position_embeddings=self.length,
        )  # fmt: skip

    def batch(self, rank: int, step: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * step + rank)
        return torch.randint(0, self.vocabulary, (self.rows, self.length), generator=generator)


SHAPES = {"cpu": Shape(512, 256, 3, 32, 2048, 4, 128), "cuda": Shape(2048, 1024, 4, 64, 32768, 8, 1024)}
# What products are computed in; weights are float32.
STREAM = {"cpu": torch.float32, "cuda": torch.bfloat16}
# One step on [B, L]: the mean loss over all ranks, seconds, bytes of rows and of all else that this rank sent.
Step = Callable[[torch.Tensor], tuple[float, float, int, int]]


def clock(mesh: Mesh) -> float:
    """The time when all ranks have come here with all that they began."""
    if mesh.device.type == "cuda":
        torch.cuda.synchronize()
    dist.barrier()
    return time.perf_counter()


def with_luffy(folder: str, mesh: Mesh, recipe: str, dense: str) -> Step:
    stream = STREAM[mesh.device.type]
    model = load(folder, mesh, recipe, dtype=torch.float32, stream_dtype=stream, dense=dense).train()
    comm = model.runtime.comm
    sync = GradientSync(model, comm)

    def step(ids: torch.Tensor) -> tuple[float, float, int, int]:
        comm.meter.take()
        begin = clock(mesh)
        loss = sync(model.batch(ids, labels=ids)).loss
        loss.backward()
        sync.finish()
        seconds = clock(mesh) - begin
        sent = by_direction(comm.meter.take())
        rows = sum(sent[d] for d in ROWS)
        model.zero_grad(set_to_none=True)
        return float(comm.all_reduce(loss.detach().clone())), seconds, rows, sum(sent.values()) - rows

    return step


def with_transformers(folder: str, mesh: Mesh, counter: ByteCounter) -> Step:
    from transformers.distributed import DistributedConfig

    n = mesh.world_size
    config = DistributedConfig(
        fsdp_size=n, ep_size=n, ep_implementation="all_to_all",
        fsdp_mixed_precision=STREAM[mesh.device.type] == torch.bfloat16,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(
        folder, distributed_config=config, dtype=torch.float32, experts_implementation="grouped_mm"
    ).train()
    if dist.get_backend() == "gloo":
        sum_over_gloo(model, counter)

    def step(ids: torch.Tensor) -> tuple[float, float, int, int]:
        ids = ids.to(mesh.device)
        counter.take()
        begin = clock(mesh)
        counter.begin(backward=False)
        loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        counter.begin(backward=True)
        loss.backward()
        seconds = clock(mesh) - begin
        sent = counter.take()
        rows = sum(sent[d] for d in ROWS)
        model.zero_grad(set_to_none=True)
        mean = loss.detach().float().clone()
        dist.all_reduce(mean)
        return float(mean) / n, seconds, rows, sum(sent.values()) - rows

    return step


def work(folder: str, device: str, rounds: int, target: Path) -> None:
    """One rank's part in one network: every system, in turns; the first rank writes what all found."""
    counter = ByteCounter().install()
    mesh, shape = luffy.join_world(device), SHAPES[device]
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    systems = {name: with_luffy(folder, mesh, *how) for name, how in SYSTEMS.items()}
    systems["transformers"] = with_transformers(folder, mesh, counter)
    names, found = list(systems), {name: [] for name in systems}
    gc.collect()
    gc.disable()
    for i in range(WARM_UP + rounds):
        for name in names[i % len(names) :] + names[: i % len(names)]:
            found[name].append(systems[name](shape.batch(mesh.rank, i)))
    all_ranks: list[Any] = [None] * mesh.world_size
    dist.all_gather_object(all_ranks, found)
    if mesh.rank == 0:
        lab = current_lab()
        network = {"provenance": "emulated", "network": lab.network} if lab else {"provenance": "measured"}
        tokens = shape.rows * shape.length
        rows = [summary(name, np.array([part[name] for part in all_ranks]), tokens) for name in names]
        write_json_atomic(target, {"environment": describe_machine(device) | network, "systems": rows})
    dist.barrier()
    dist.destroy_process_group()


def summary(name: str, steps: np.ndarray, tokens: int) -> dict[str, Any]:
    """steps: [ranks, steps, 4]."""
    steps = steps[:, WARM_UP:]
    seconds = steps[:, :, 1].max(0)
    rows, rest = (np.median(steps[:, :, i].mean(0)) / tokens for i in (2, 3))
    return {
        "system": name,
        "loss": float(steps[0, -1, 0]),
        "row_bytes_per_token": float(rows),
        "other_bytes_per_token": float(rest),
        "seconds": [float(np.quantile(seconds, q)) for q in (0.25, 0.5, 0.75)],
        "seconds_of_rounds": seconds.tolist(),
    }


def ways(device: str, ranks: int) -> dict[str, tuple[list[str], dict[str, str]]]:
    """By network: the command that starts a script's ranks there, and what it finds in its environment."""
    start = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    if device == "cuda":
        return {"as joined": (start, {}), "NCCL sockets": (start, SOCKETS)}
    found: dict[str, tuple[list[str], dict[str, str]]] = {"loopback": (start, {})}
    missing = missing_capabilities()
    if missing:
        click.echo(f"no links of {LINK}: a lab needs root ({' and '.join(missing)}); loopback alone is measured")
    else:
        lab = [sys.executable, "-m", "luffy.train.cli", "lab", "--ranks", str(ranks), "--link", LINK, "--per-rank"]
        found[LINK] = ([*lab, "--", sys.executable], {})
    return found


def table(systems: list[dict[str, Any]]) -> str:
    lines = ["| system | rows, kB/token | all else, kB/token | seconds a step | loss |", "|---|---|---|---|---|"]
    for s in systems:
        low, mid, high = s["seconds"]
        rows, rest = s["row_bytes_per_token"] / 1e3, s["other_bytes_per_token"] / 1e3
        lines.append(
            f"| {s['system']} | {rows:.2f} | {rest:.2f} | {mid:.3f} [{low:.3f}, {high:.3f}] | {s['loss']:.5f} |"
        )
    return "\n".join(lines)


def same_loss(systems: list[dict[str, Any]], device: str) -> bool:
    losses = np.array([s["loss"] for s in systems])
    return bool(np.ptp(losses) <= (1e-5 if STREAM[device] == torch.float32 else 1e-2) * losses.mean())


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--ranks", default=4, show_default=True)
@click.option("--rounds", default=7, show_default=True)
@click.option("--out", default="docs/results/huggingface.json", show_default=True, type=click.Path(path_type=Path))
@click.option("--worker", hidden=True, help="Folder of the model, for a rank.")
def main(device: str, ranks: int, rounds: int, out: Path, worker: str | None) -> None:
    """Measure all systems in both networks, write JSON, print tables."""
    if worker is not None:
        work(worker, device, rounds, out)
        return
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(SHAPES[device].config()).save_pretrained(folder)
        for way, (start, extra) in ways(device, ranks).items():
            target = Path(folder) / "found.json"
            own = [str(Path(__file__)), "--device", device, "--rounds", str(rounds), "--out", str(target)]
            environment = {"OMP_NUM_THREADS": "1"} | dict(os.environ) | extra
            subprocess.run([*start, *own, "--worker", folder], env=environment, check=True)
            found[way] = json.loads(target.read_text())
            target.unlink()
            click.echo(f"\n{way}, {ranks} ranks\n\n{table(found[way]['systems'])}\n")
    out.parent.mkdir(parents=True, exist_ok=True)
    write_json_atomic(out, {"device": device, "ranks": ranks, "rounds": rounds, "shape": vars(SHAPES[device]), **found})
    if not all(same_loss(f["systems"], device) for f in found.values()):
        raise click.ClickException("the losses differ: systems did not compute the same")


if __name__ == "__main__":
    main()
