"""Ranks with a GPU each, over NCCL: with NVLink as it is, and held to sockets as a slow link.

    python benchmarks/multigpu.py --ranks 2 --budget-seconds 280 --out runs/multigpu -- --data FILE
    make bench-multigpu                                               (as many ranks as there are GPUs)

Two comparisons of all recipes on the same model, data and seed: over whatever joins the GPUs (NVLink, PCIe), and with
NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1 NCCL_NET=Socket, where every byte goes through the loopback interface. What each
way carries is measured with all ranks at work. `auto` is judged by its steps after its trials: where the exchange
costs next to nothing it has to get out of the way, and be no slower than `vanilla_dedup`.
"""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from compare_tools import Cell, Study, bars, by_recipe, folder_of, report, run_cell, settings_of, step_seconds

from luffy.report.runs import column, read_metrics

SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
ENTRIES = (
    "vanilla;vanilla_dedup;luffy;auto;luffy_max;janus;fastermoe;paper=luffy_paper;netmoe;"
    "overlapped=vanilla_dedup --overlap"
)
WAYS = {"as joined": {}, "sockets": SOCKETS}


def cells(s):
    options = [
        "--backend", "nccl", "--model", "moe-gpt2", "--layers", "6", "--vocab-size", "8192", "--sequence-length", "512",
        "--batch-size", str(32 * s.ranks), "--gradient-dtype", "bfloat16", "--keep-checkpoints", "0",
        "--eval-every", "0", "--eval-batches", "1", "--rehome-every", "250",
    ]  # fmt: skip
    return [Cell(way, ENTRIES, options) for way in WAYS]


STUDY = Study(
    "multigpu",
    "Seconds a step (median) by recipe, ranks with a GPU each over NCCL",
    cells,
    lambda found: by_recipe(found, "links", step_seconds, "{:.4f}"),
    lambda found: bars(found, step_seconds, "Step time with a GPU a rank", "seconds a step"),
    steps=30,
)


def settled(found: list[dict], folder: Path) -> dict[str, float]:
    """Median seconds of the last third of each recipe's steps: when `auto` has long chosen."""
    out = {}
    for summary in found:
        records = read_metrics(folder / summary["folders"][0] / "metrics.jsonl")
        seconds = column(records, "seconds")
        out[summary["label"]] = float(np.median(seconds[-max(1, len(seconds) // 3) :]))
    return out


def link_rate(rank: int) -> float:
    """Bytes a second that each rank sends while all do: the median of nine all-to-alls of 64 MB."""
    import torch
    import torch.distributed as dist

    n = dist.get_world_size()
    mine = torch.zeros(n, (64 << 20) // n, dtype=torch.uint8, device="cuda")
    theirs, seconds = torch.empty_like(mine), []
    for _ in range(12):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        dist.all_to_all_single(theirs, mine)
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return mine.nbytes * (n - 1) / n / float(np.median(seconds[3:]))


@click.command(help=__doc__)
@click.option("--ranks", default=2, show_default=True, help="GPUs.")
@click.option("--steps", type=int)
@click.option("--out", default="runs/multigpu", type=click.Path(path_type=Path), show_default=True)
@click.option("--budget-seconds", default=3600.0, show_default=True)
@click.option(
    "--recipes", default=ENTRIES, show_default=True, help="As of luffy compare; vanilla_dedup and auto among them."
)
@click.option("--only-rate", is_flag=True, help="Print what an all-to-all carries, bytes a second of each rank.")
@click.argument("more", nargs=-1, type=click.UNPROCESSED)
def main(ranks, steps, out, budget_seconds, recipes, only_rate, more):
    if only_rate:
        from luffy.testing import run_ranks

        click.echo(float(np.median(run_ranks(link_rate, ranks, backend="nccl"))))
        return
    s = settings_of(
        STUDY, device="cuda", ranks=ranks, link=None, steps=steps, out=out, budget_seconds=budget_seconds, small=False,
        more=more,
    )  # fmt: skip
    found, extra = {}, {}
    deadline = s.deadline
    for i, (cell, (way, variables)) in enumerate(zip(cells(s), WAYS.items(), strict=True)):
        os.environ |= variables
        # Half of what is left each, so that a slow first way does not leave nothing for the second.
        left = deadline - time.monotonic()
        here = s.until(time.monotonic() + left / (len(WAYS) - i))
        cell = replace(cell, recipes=recipes)
        summaries = run_cell(cell, here)
        if summaries is None:
            click.echo(f"{way}: not finished; call again to continue", err=True)
            continue
        found[way] = summaries
        extra[way] = {"settled_seconds": settled(summaries, folder_of(cell, here)), "bytes_per_second": rate_of(ranks)}
    if found:
        report(STUDY, s, found, len(found) == len(WAYS), ways=extra)
        for way, numbers in extra.items():
            auto, dedup = (numbers["settled_seconds"][k] for k in ("auto", "vanilla_dedup"))
            click.echo(f"{way}: {numbers['bytes_per_second'] / 1e9:.1f} GB/s a rank; auto over vanilla_dedup, settled: "
                       f"{auto / dedup:.3f}")  # fmt: skip


def rate_of(ranks: int) -> float:
    """`link_rate` of fresh processes, which see the environment of the moment."""
    command = [sys.executable, __file__, "--ranks", str(ranks), "--only-rate"]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


if __name__ == "__main__":
    main()
