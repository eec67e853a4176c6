"""torchtitan's own all-to-all and Luffy's exchange in its models: bytes and seconds of a step.

    python benchmarks/titan.py --out docs/results/torchtitan.json               # loopback and, as root, behind links
    python benchmarks/titan.py --ranks 2 --links none --out /tmp/torchtitan.json

Each launch trains one debug model of torchtitan several times over, a step of each by turns, so that what else the
machine does hits all alike: examples/torchtitan_luffy.py, whose loop stands for the Trainer. Rows of other ranks are
counted in both: by torchtitan's split sizes there, by the meter here, with all that goes along (split sizes, ids,
weights). In the lab the bytes that the interfaces sent are read as well: all traffic, with that of FSDP2 and headers.
Medians over the steps after the first; quartiles of the seconds.
"""

from __future__ import annotations

import json
import logging
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np

ROOT = Path(__file__).resolve().parent.parent
MODELS = ("deepseek_v3", "qwen3")
WAYS: dict[str, list[Any]] = {
    "torchtitan": ["benchmarks.titan_counting.counted"],
    "luffy": ["luffy.titan.exchange"],
    "luffy, int8": [("luffy.titan.exchange", {"wire": "int8"})],
}
WARM_UP = 1


def sent_by_interfaces() -> int:
    """Bytes that left this rank's network namespace, whatever sent them."""
    lines = [line.split(":") for line in Path("/proc/self/net/dev").read_text().splitlines() if ":" in line]
    return sum(int(numbers.split()[8]) for name, numbers in lines if name.strip() != "lo")


@dataclass
class Measured:
    loss: float
    seconds: float
    exchange_bytes: int
    interface_bytes: int


def rank_main(model: str, steps: int, tokens: int, out: Path) -> None:
    """One rank of one launch; rank 0 writes what all found."""
    import torch
    import torch.distributed as dist

    from benchmarks.titan_counting import CountedDispatcher
    from examples.torchtitan_luffy import Loop, on_a_cpu
    from luffy.titan import metrics

    logging.disable(logging.INFO)
    dist.init_process_group("gloo")
    loops = {}
    for way, overrides in WAYS.items():
        config = on_a_cpu(model, overrides, layers=2)
        config.training.seq_len, config.training.local_batch_size = 128, tokens // 128
        config.training.mixed_precision_param = "bfloat16"  # as torchtitan trains
        config.parallelism.fsdp_reshard_after_forward = "never"
        loops[way] = Loop(config)
    found: dict[str, list[Measured]] = {way: [] for way in WAYS}
    for _ in range(WARM_UP + steps):
        for way, loop in loops.items():
            dist.barrier()
            CountedDispatcher.sent = 0
            if way != "torchtitan":
                metrics(loop.model)
            before, begin = sent_by_interfaces(), time.perf_counter()
            loss = loop.step()
            dist.barrier()
            seconds, interface = time.perf_counter() - begin, sent_by_interfaces() - before
            own = metrics(loop.model)["bytes_sent"] if way != "torchtitan" else 2 * CountedDispatcher.sent
            sums = torch.tensor([int(own), interface])
            dist.all_reduce(sums)
            found[way].append(Measured(loss, seconds, *sums.tolist()))
    if dist.get_rank() == 0:
        out.write_text(json.dumps({way: summary(steps[WARM_UP:]) for way, steps in found.items()}))
    dist.destroy_process_group()


def summary(steps: list[Measured]) -> dict[str, Any]:
    return {
        "loss": steps[-1].loss,
        "seconds": [float(np.quantile([s.seconds for s in steps], q)) for q in (0.5, 0.25, 0.75)],
        "exchange_bytes": int(np.median([s.exchange_bytes for s in steps])),
        "interface_bytes": int(np.median([s.interface_bytes for s in steps])),
    }


def launch(model: str, ranks: int, link: str, steps: int, tokens: int) -> dict[str, Any]:
    """The ways on one model, number of ranks and kind of link: summaries, and what the links gave."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder, "found.json")
        job = ["-m", "benchmarks.titan", "--rank-of", model, "--steps", str(steps), "--tokens", str(tokens)]
        job += ["--out", str(out)]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        env = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
        if link == "none":
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *job]
        else:
            lab = [sys.executable, "-m", "luffy.train.cli", "lab", "--ranks", str(ranks), "--link", link, "--"]
            command = [*lab, sys.executable, *job]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise click.ClickException(f"{' '.join(command)} failed:\n{done.stderr[-3000:]}")
        return {"model": model, "ranks": ranks, "link": link, "steps": steps, "ways": json.loads(out.read_text())}


def table(runs: list[dict[str, Any]], link: str) -> str:
    """Markdown of the runs over one kind of link."""
    lab = link != "none"
    lines = [
        "| model | ranks | exchange | rows, MB a step |" + (" all traffic, MB |" if lab else "") + " seconds a step |",
        "|---|---|---|---|" + ("---|" if lab else "") + "---|",
    ]
    for run in (r for r in runs if r["link"] == link):
        own = run["ways"]["torchtitan"]
        for way, found in run["ways"].items():
            mid, low, high = found["seconds"]
            share = "" if way == "torchtitan" else f" ({found['exchange_bytes'] / own['exchange_bytes']:.2f})"
            wire = f" {found['interface_bytes'] / 1e6:.0f} |" if lab else ""
            lines.append(
                f"| {run['model']} | {run['ranks']} | {way} | {found['exchange_bytes'] / 1e6:.1f}{share} |{wire} "
                f"{mid:.2f} [{low:.2f}, {high:.2f}] |"
            )
    return "\n".join(lines)


@click.command()
@click.option("--models", default=",".join(MODELS), show_default=True)
@click.option("--ranks", default="2,4", show_default=True)
@click.option("--links", default="none,1gbit,100mbit", show_default=True, help="none is loopback; others need root.")
@click.option("--steps", default=7, show_default=True)
@click.option("--tokens", default=512, show_default=True, help="Of a rank and step.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--rank-of", hidden=True)
def main(models: str, ranks: str, links: str, steps: int, tokens: int, out: Path, rank_of: str | None) -> None:
    """Launch all, write JSON, print a table for each kind of link."""
    if rank_of is not None:
        return rank_main(rank_of, steps, tokens, out)
    from luffy.train.metrics import describe_machine

    kept = json.loads(out.read_text())["runs"] if out.exists() else []
    for link in links.split(","):
        for model in models.split(","):
            for n in map(int, ranks.split(",")):
                run = launch(model, n, link, steps, tokens)
                kept = [r for r in kept if (r["model"], r["ranks"], r["link"]) != (model, n, link)] + [run]
                settings = {"tokens_per_rank": tokens, "environment": describe_machine("cpu")}
                out.parent.mkdir(parents=True, exist_ok=True)
                out.write_text(json.dumps({**settings, "runs": kept}, indent=1) + "\n")
    for link in links.split(","):
        click.echo(f"{'measured, loopback' if link == 'none' else f'emulated, {link} a rank'}:\n{table(kept, link)}\n")
    return None


if __name__ == "__main__":
    main()
