"""How long does `luffy plan` take, by the number of ranks and of experts?

    python benchmarks/plan_command.py --json docs/results/plan_command.json
    python benchmarks/plan_command.py --cells 64x8:64,128x8:1024 --layers 12 --steps 12

A cell is NODESxRANKS:EXPERTS. Its trace is SYNTHETIC: each sequence has a few favourite experts, which take half of its
choices, the same in all layers; lengths are even or, with --uneven, spread seven-fold. The command runs as a user runs
it, all recipes, in a process of its own; the time includes starting Python. Where a cluster has more ranks than
experts, it plans for one of several groups that share them (`--ep-size`).
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

import click
import numpy as np

from luffy.plan.topology import parse_topology
from luffy.plan.trace import RoutingTrace, TraceStep
from luffy.train.metrics import describe_machine, write_json_atomic
from luffy.train.plan import group_of

CELLS = "1x8:64,8x8:64,32x8:256,128x8:256,128x8:1024"
FAVOURITES = 6
HIDDEN = 1024


def synthetic_trace(experts: int, sequences: int, tokens: int, layers: int, steps: int, uneven: bool) -> RoutingTrace:
    """Top-2 routing of `steps` steps."""
    rng, made = np.random.default_rng(0), []
    for number in range(steps):
        lengths = np.full(sequences, tokens)
        if uneven:
            lengths = rng.integers(tokens // 4, 7 * tokens // 4, sequences)
        T = int(lengths.sum())
        liked = np.repeat(rng.integers(0, experts, (sequences, FAVOURITES)), lengths, axis=0)
        chosen = np.empty((layers, T, 2), dtype=np.int16)
        for layer in range(layers):
            of_mine = np.take_along_axis(liked, rng.integers(0, FAVOURITES, (T, 2)), axis=1)
            chosen[layer] = np.where(rng.random((T, 2)) < 0.5, of_mine, rng.integers(0, experts, (T, 2)))
        chosen[..., 1] = np.where(chosen[..., 1] == chosen[..., 0], (chosen[..., 1] + 1) % experts, chosen[..., 1])
        made.append(TraceStep(number + 1, lengths, np.zeros(sequences, dtype=np.int64), chosen, chosen[1:]))
    about = {"model": "synthetic", "expert_num_bytes": 16 * HIDDEN * HIDDEN}
    owners = np.zeros((layers, experts), dtype=np.int64)
    return RoutingTrace(tuple(made), experts, 2, HIDDEN, 2 * HIDDEN, owners, about)


@click.command(help=__doc__)
@click.option("--cells", default=CELLS, show_default=True, help="NODESxRANKS:EXPERTS,...")
@click.option("--recipes", help="As of luffy plan (default: its own).")
@click.option("--layers", default=4, show_default=True)
@click.option("--steps", default=8, show_default=True, help="Recorded steps.")
@click.option("--tokens", default=64, show_default=True, help="Mean tokens of a sequence; one sequence a rank.")
@click.option("--uneven", is_flag=True)
@click.option("--repeats", default=3, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path))
def main(
    cells: str, recipes: str | None, layers: int, steps: int, tokens: int, uneven: bool, repeats: int,
    target: Path | None,
) -> None:  # fmt: skip
    found = []
    for cell in cells.split(","):
        shape, experts = cell.split(":")
        spec = f"{shape}:intra=64gbit,inter=10gbit"
        topology = parse_topology(spec)
        group = group_of(topology, int(experts), None)
        with tempfile.TemporaryDirectory() as folder:
            trace = synthetic_trace(int(experts), group.world_size, tokens, layers, steps, uneven)
            trace.save(Path(folder, "trace.npz"))
            command = [sys.executable, "-m", "luffy.train.cli", "plan", "--trace", f"{folder}/trace.npz"]
            command += ["--topology", spec, "--json", f"{folder}/plan.json"]
            command += ["--recipes", recipes] if recipes else []
            seconds = []
            for _ in range(repeats):
                begin = time.perf_counter()
                subprocess.run(command, check=True, capture_output=True)
                seconds.append(time.perf_counter() - begin)
            predictions = json.loads(Path(folder, "plan.json").read_text())["predictions"]
        row = {"topology": shape, "ranks": topology.world_size, "ranks_that_share_experts": group.world_size,
               "experts": int(experts), "seconds": median(seconds), "all_seconds": seconds,
               "recipes": [p["recipe"] for p in predictions]}  # fmt: skip
        found.append(row)
        click.echo(f"{row['ranks']:5} ranks ({group.world_size} share experts), {experts:>5} experts: "
                   f"{row['seconds']:.1f} s, {len(predictions)} recipes")  # fmt: skip
        if target is not None:
            settings = {"layers": layers, "steps": steps, "tokens_a_sequence": tokens, "uneven": uneven}
            about = {"provenance": "measured", "traces": "synthetic", "hardware": describe_machine("cpu")}
            write_json_atomic(target, about | settings | {"cells": found})


if __name__ == "__main__":
    main()
