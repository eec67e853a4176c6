"""`luffy doctor`: what is installed, what this machine has, what its links give, and which models fit."""

from __future__ import annotations

import importlib.util
import json
import os
import platform
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

import click
import torch

from luffy.config import PRESETS
from luffy.errors import UserError
from luffy.lab.namespace import missing_capabilities
from luffy.lab.probe import format_rate
from luffy.report.units import format_bytes, format_count, format_seconds
from luffy.train.launch import choose_device, join_world, launch
from luffy.train.memory import count_parameters, training_need
from luffy.version import __version__

_NEEDED = ("numpy", "scipy", "tokenizers", "safetensors", "pyarrow", "matplotlib")
_OPTIONAL = {
    "triton": "kernels on a GPU",
    "transformers": "luffy finetune",
    "peft": "luffy finetune --lora",
    "accelerate": "transformers.Trainer",
    "pyroute2": "luffy lab",
    "tensorboard": "curves",
}


def diagnose(ranks: int | None = None) -> None:
    """Print it all. ranks: between how many links are measured (default: one a GPU, or one a core, 2 to 8); 1: none."""
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    ranks = ranks or min(8, max(2, gpus or os.cpu_count() or 2))
    memory = _gpu_memory() if gpus else _host_memory() // ranks
    for title, lines in (
        ("versions", versions()),
        ("machine", machine(gpus)),
        (f"links between {ranks} ranks", links(ranks) if ranks > 1 else iter(["not measured between fewer than 2"])),
        (f"models that {ranks} ranks of {format_bytes(memory)} hold", models(ranks, memory)),
    ):
        click.echo(f"{title}:")
        for line in lines:
            click.echo(f"  {line}")


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def versions() -> Iterator[str]:
    cuda = torch.version.cuda
    built = f"for CUDA {cuda}, NCCL {'.'.join(map(str, torch.cuda.nccl.version()))}" if cuda else "for CPUs"
    yield f"luffy {__version__}, Python {platform.python_version()}, torch {torch.__version__} {built}"
    yield ", ".join(f"{name} {_version(name) or 'MISSING'}" for name in _NEEDED)
    there = {name: found for name in _OPTIONAL if (found := _version(name)) and importlib.util.find_spec(name)}
    yield ", ".join(f"{name} {found}" for name, found in there.items())
    for name, use in _OPTIONAL.items():
        if name not in there:
            yield f"not installed: {name} ({use})"


def machine(gpus: int) -> Iterator[str]:
    from luffy.train.metrics import describe_machine

    yield f"{describe_machine('cpu')['host']}, {format_bytes(_host_memory())} of memory"
    for i in range(gpus):
        p = torch.cuda.get_device_properties(i)
        peers = [j for j in range(gpus) if j != i and torch.cuda.can_device_access_peer(i, j)]
        reach = f", reads {'all others' if len(peers) == gpus - 1 else peers} directly" if peers else ""
        yield f"GPU {i}: {p.name}, {format_bytes(p.total_memory)}, compute capability {p.major}.{p.minor}{reach}"
    if not gpus:
        yield "no GPU that torch sees: --device cpu, for trying things out"
    missing = missing_capabilities()
    yield "luffy lab: " + (f"needs root ({', '.join(missing)})" if missing else "can make networks here")


def _host_memory() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def _gpu_memory() -> int:
    return min(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))


def links(ranks: int) -> Iterator[str]:
    """What ranks of this machine give each other, over the backend that a run would choose."""
    device, backend = choose_device("auto", "auto", ranks)
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "links.json")
        launch(_measure, (str(target),), ranks)
        found = json.loads(target.read_text())
    rate, latency = found["bytes_per_second"], found["latency_seconds"]
    of = f"{backend} on {device}"
    yield f"{of}: {format_rate(rate)} a rank and direction while all send, {format_seconds(latency)} a message"
    yield f"for luffy plan: --topology {ranks}:intra={rate * 8 / 1e6:.0f}mbit,latency={latency * 1e6:.0f}us"


def _measure(target: str) -> None:
    from luffy.comm import Comm
    from luffy.plan.topology import Topology
    from luffy.train.rates import measure_links

    comm = Comm.create(join_world())
    found = measure_links(comm, Topology.flat(comm.mesh.ep_size))
    mine = torch.tensor([found.intra_node_bytes_per_second, found.latency_seconds[1]], dtype=torch.float64)
    rate, latency = comm.all_gather_world(mine.to(comm.mesh.device)).cpu().view(-1, 2).unbind(1)
    if comm.mesh.rank == 0:
        content = {"bytes_per_second": float(rate.min()), "latency_seconds": float(latency.max())}
        Path(target).write_text(json.dumps(content))


def models(ranks: int, memory: int) -> Iterator[str]:
    """Weights, gradients and optimizer against the memory of a rank; activations come on top."""
    width = max(map(len, PRESETS))
    for name, config in PRESETS.items():
        parameters = sum(count_parameters(config, 1))
        try:
            config.check_ranks(ranks)
        except UserError:
            verdict = f"its experts cannot be divided among {ranks} ranks"
        else:
            needed = training_need(config, ranks, torch.float32, 0).num_bytes
            verdict = f"{format_bytes(needed)} a rank before activations: "
            verdict += "fits" if needed < 0.8 * memory else "too large"
        yield f"{name:<{width}}  {format_count(parameters):>5} parameters, {verdict}"
