"""What seats save: rows that cross ranks, and rows of the busiest rank, over vanilla_dedup's with sequences as dealt.

    python benchmarks/seats.py table --trace runs/*/traces/*.npz --ranks 4,8,16 --json docs/results/seats.json
    python benchmarks/seats.py stale --trace runs/seats/trace --ranks 8 --json runs/seats_stale.json

Traces hold features of sequences (`luffy train --trace-every`, or whatever records TraceSteps); each is a file or a
folder of files. `table`: half of a trace's steps to fit experts, seats and predictor, a sixth to judge by, the rest to
count on. A mapping of experts is fitted for each way to place sequences. `stale`: predictors fitted to one time of a
run and used at later ones, with experts where they were at first; beside them one that is refreshed as it goes.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np

from luffy.plan.cost import AttentionCost
from luffy.plan.mapping import learn_rows, plan_mapping
from luffy.plan.prediction import busiest_rows
from luffy.plan.replay import Wire, replay_step, rows_of_all_layers, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import RoutingTrace, TraceStep, join_traces
from luffy.seats.predictor import RowPredictor
from luffy.train.metrics import write_json_atomic

WAYS = (
    ("re-homed, as dealt", {}),
    ("moving in every layer, next known", {"strategy": "best", "look_ahead": "actual"}),
    ("one seat, known", {"seats": "known"}),
    ("one seat, predicted", {"seats": "predicted"}),
)


def load(path: Path) -> RoutingTrace:
    """A file, or all files of a folder. Forecasts, which nothing here asks for, are dropped."""
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    return join_traces([RoutingTrace.load(f) for f in files])


def crossing(steps: Sequence[TraceStep], owners: np.ndarray, wire: Wire) -> tuple[int, int]:
    """Rows that leave their rank, dispatch and combine, and those through the busiest rank of each exchange, summed."""
    layers = [layer for s in steps for layer in replay_step(s, owners, wire)]
    total = sum(sum(x.dispatch[1:]) + sum(x.combine[1:]) for x in layers) // wire.row_num_bytes
    return total, sum(busiest_rows(x, wire.topology) for x in layers)


def table_of(trace: RoutingTrace, ranks: int) -> dict[str, Any]:
    """(mean, busiest) over vanilla_dedup as dealt, by way."""
    steps, half = list(trace.steps), len(trace.steps) // 2
    sixth = max(1, len(steps) // 6)
    fit, judge, count = steps[:half], steps[half : half + sixth], steps[half + sixth :]
    owners = spread_evenly(trace.num_layers, trace.num_experts, ranks)
    wire = Wire(Topology.flat(ranks), trace.row_num_bytes, attention=AttentionCost(trace.hidden_size))
    base, out, mapped = crossing(count, owners, wire), {}, {}
    for name, changes in WAYS:
        begin, way = time.perf_counter(), replace(wire, **changes)
        # Known and predicted seats are searched alike; they differ in what a mapping is judged by.
        key = (way.strategy, way.seats != "as-read")
        if key not in mapped:
            mapped[key] = plan_mapping(fit, judge, owners, way, expert_num_bytes=0, steps_until_next=1).owners
        if way.seats == "predicted":
            way = replace(way, predictor=learn_rows(fit + judge, mapped[key], way))
        mine = crossing(count, mapped[key], way)
        out[name] = [mine[0] / base[0], mine[1] / base[1]]
        seconds = time.perf_counter() - begin
        click.echo(f"  {ranks} ranks, {name}: {out[name][0]:.3f}, {out[name][1]:.3f} ({seconds:.0f} s)")
    return out


@click.group()
def main() -> None:
    """Seats, replayed."""


@main.command()
@click.option("--trace", "paths", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--ranks", default="4,8,16", show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path))
def table(paths: tuple[Path, ...], ranks: str, target: Path | None) -> None:
    """One row a trace and number of ranks."""
    found = []
    for path in paths:
        trace = load(path)
        click.echo(f"{path}: {trace.about}")
        head = {"trace": path.stem, "about": trace.about, "experts": trace.num_experts, "top_k": trace.top_k}
        fitting = [int(n) for n in ranks.split(",") if trace.num_experts % int(n) == 0]
        found += [{**head, "steps": len(trace.steps), "ranks": n, "ways": table_of(trace, n)} for n in fitting]
    click.echo("| trace | experts, top-k | ranks | " + " | ".join(name for name, _ in WAYS) + " |")
    click.echo("|---" * (3 + len(WAYS)) + "|")
    for f in found:
        cells = [f"{mean:.3f} ({busiest:.3f})" for mean, busiest in f["ways"].values()]
        click.echo(f"| {f['trace']} | {f['experts']}, {f['top_k']} | {f['ranks']} | " + " | ".join(cells) + " |")
    if target is not None:
        write_json_atomic(target, {"rows over vanilla_dedup as dealt, mean and busiest rank": found})


def fade_in(predictor: RowPredictor, steps: Sequence[TraceStep], owners: np.ndarray, ranks: int) -> None:
    """What a refresh does."""
    predictor.fade()
    for s in steps:
        predictor.observe(s.features, s.lengths, rows_of_all_layers(s, owners, ranks))
    predictor.solve()


def ages_of(trace: RoutingTrace, ranks: int) -> dict[str, Any]:
    """Shares of rows that leave with seats decided at one time by what was learnt at another.

    Steps with one number are one time. by_age[i][j]: predictor of time i, sequences of time j > i. refreshed[j]: one
    that has seen all times before j, fading. known[j], dealt[j]: the bounds.
    """
    times = sorted({s.step for s in trace.steps})
    at = [[s for s in trace.steps if s.step == t] for t in times]
    owners = spread_evenly(trace.num_layers, trace.num_experts, ranks)
    wire = Wire(Topology.flat(ranks), trace.row_num_bytes, attention=AttentionCost(trace.hidden_size))
    base = [crossing(steps, owners, wire)[0] for steps in at]

    def share(j: int, way: Wire) -> float:
        return crossing(at[j], owners, way)[0] / base[j]

    by_age = {}
    for i in range(len(times) - 1):
        way = replace(wire, seats="predicted", predictor=learn_rows(at[i], owners, wire))
        by_age[str(times[i])] = {str(times[j]): share(j, way) for j in range(i + 1, len(times))}
    refreshed, predictor = {}, RowPredictor(ranks)
    for j in range(1, len(times)):
        fade_in(predictor, at[j - 1], owners, ranks)
        refreshed[str(times[j])] = share(j, replace(wire, seats="predicted", predictor=predictor))
    known = {str(times[j]): share(j, replace(wire, seats="known")) for j in range(len(times))}
    return {"by_age": by_age, "refreshed": refreshed, "known": known}


@main.command()
@click.option("--trace", "path", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--ranks", default=8, show_default=True)
@click.option("--json", "target", type=click.Path(path_type=Path))
def stale(path: Path, ranks: int, target: Path | None) -> None:
    """Predictors of one time used at later ones: rows that leave, over those with sequences as dealt."""
    trace = load(path)
    found = ages_of(trace, ranks)
    later = list(found["refreshed"])
    click.echo("| seats of step | " + " | ".join(later) + " |")
    click.echo("|---" * (1 + len(later)) + "|")
    rows = {"known": found["known"], "refreshed at each": found["refreshed"]}
    rows |= {f"fitted at {t}": shares for t, shares in found["by_age"].items()}
    for name, shares in rows.items():
        click.echo(f"| {name} | " + " | ".join(f"{shares[t]:.3f}" if t in shares else "" for t in later) + " |")
    if target is not None:
        write_json_atomic(target, {"about": trace.about, "ranks": ranks, **found})


if __name__ == "__main__":
    main()
