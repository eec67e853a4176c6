"""Which rows cross ranks in a trained model, by recipe, ranks, experts, top-k, locality loss, re-homing?

    python benchmarks/migration_bytes.py train --group base --data FOLDER --device cuda --out runs/migration_bytes
    python benchmarks/migration_bytes.py table --out runs/migration_bytes --json docs/results/migration_bytes.json

`train` trains each case of a group once, on one rank, recording routing traces, and then counts what its last recorded
steps put on the wire: the same routing replayed for 4, 8 and 16 ranks and for each recipe, token by token (a replayed
step equals the traffic meter of a real one to the byte; tests/model/test_recorder.py). A mapping of experts is fitted
to some recorded steps, priced on others, and counted on yet others. A case that is done is not done again, and nothing
new begins when `--budget-seconds` is nearly over, so that calls can be repeated until all is there.
"""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import click
import numpy as np

from luffy.plan.cost import AttentionCost
from luffy.plan.mapping import learn_rows, plan_mapping
from luffy.plan.replay import Wire, replay_step, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import RoutingTrace, TraceStep, join_traces
from luffy.train.metrics import read_metrics

LONGEST = [0.0]  # seconds, of the cases that this process ran
RANKS = (2, 4, 8, 16)
LOCALITY = (0.0, 0.02, 0.05)
FIT, JUDGE, COUNT = 4, 2, 6  # recorded steps: to fit a mapping, to judge it, to count bytes with
SIZE = ("--layers 6 --hidden-size 512 --heads 8 --expert-hidden-size 2048 --dense-hidden-size 2048 "
        "--max-sequence-length 512 --vocab-size 8192 --batch-size 64 --lr 1e-3")  # fmt: skip
SMALL = ("--layers 3 --hidden-size 128 --heads 4 --expert-hidden-size 256 --dense-hidden-size 256 "
         "--max-sequence-length 64 --vocab-size 2048 --batch-size 32 --lr 2e-3")  # fmt: skip


@dataclass(frozen=True)
class Case:
    model: str = "moe-gpt2"
    experts: int = 16
    top_k: int = 2
    locality: float = 0.0
    seed: int = 0
    steps: int = 300
    extra: str = ""

    @property
    def name(self) -> str:
        return f"{self.model}-e{self.experts}-k{self.top_k}-l{self.locality}-s{self.seed}"


def cases(group: str) -> Iterator[Case]:
    if group == "base":
        for seed in range(3):
            yield from (Case(locality=x, seed=seed, steps=1000) for x in LOCALITY)
    elif group == "strong":
        yield from (Case(locality=0.1, seed=seed, steps=1000) for seed in range(3))
    elif group == "top-k":
        yield from (Case(top_k=k, locality=x) for x in (0.0, 0.05) for k in (1, 4, 8))
    elif group == "experts":
        yield from (Case(experts=e, locality=x) for x in (0.0, 0.05) for e in (8, 32, 64))
    elif group == "presets":
        small = "--expert-hidden-size 128"
        for x in (0.0, 0.05):
            yield Case("moe-bert-large", locality=x)
            yield Case("moe-transformer-xl", locality=x)
            yield Case("moe-llm", 64, 8, x, extra=small)
    elif group == "tiny":  # a trial of the benchmark itself
        yield Case("moe-gpt2-tiny", 16, 2, 0.05, steps=60, extra="--layers 2 --hidden-size 64 --heads 2 "
                   "--expert-hidden-size 64 --max-sequence-length 64 --vocab-size 500 --batch-size 32")  # fmt: skip
    else:
        raise click.BadParameter(f"no group {group}")


def train(case: Case, data: str, device: str, size: str, out: Path) -> None:
    """Train with traces, unless it was done before."""
    if (out / "summary.json").exists():
        return
    every = max(1, case.steps // 100)
    command = [sys.executable, "-m", "luffy.train.cli", "train", "--recipe", "vanilla_dedup", "--model", case.model]
    command += f"{size} --experts {case.experts} --top-k {case.top_k} --locality-loss {case.locality}".split()
    command += f"--seed {case.seed} --steps {case.steps} --trace-every {every} --eval-every 0 --eval-batches 20".split()
    command += [*case.extra.split(), "--checkpoint-every", "0", "--no-tensorboard", "--overwrite"]
    done = subprocess.run(
        [*command, "--data", data, "--device", device, "--out", str(out)], capture_output=True, text=True
    )
    if done.returncode:
        raise click.ClickException(f"{case.name}: {done.stderr[-2000:]}")


def crossing(steps: list[TraceStep], owners: np.ndarray, wire: Wire) -> dict[str, float]:
    """Rows per token and layer that leave a rank: dispatch, combine (forward; backward is the same again), moved."""
    replays = [layer for s in steps for layer in replay_step(s, owners, wire)]
    tokens = sum(int(s.lengths.sum()) * s.num_layers for s in steps)
    moved = sum(int((x.homes_before != x.homes_after).sum()) for x in replays)
    return {
        "dispatch": sum(sum(x.dispatch[1:]) for x in replays) / wire.row_num_bytes / tokens,
        "combine": sum(sum(x.combine[1:]) for x in replays) / wire.row_num_bytes / tokens,
        "moved": moved / max(1, sum(len(x.homes_before) for x in replays)),
    }


def replay(trace: RoutingTrace, ranks: int) -> dict[str, dict[str, float]]:
    """Rows that cross between `ranks` equal ranks, by recipe."""
    steps = list(trace.steps[-(FIT + JUDGE + COUNT) :])
    fit, judge, count = steps[:FIT], steps[FIT : FIT + JUDGE], steps[FIT + JUDGE :]
    links = Topology.flat(ranks)
    start = spread_evenly(trace.num_layers, trace.num_experts, ranks)
    size = {"row_num_bytes": trace.row_num_bytes, "attention": AttentionCost(trace.hidden_size)}

    def wire(strategy: str = "stay", look_ahead: str = "none", **more: object) -> Wire:
        return Wire(links, strategy=strategy, look_ahead=look_ahead, **size, **more)  # type: ignore[arg-type]

    seats = wire(seats="predicted")

    def seated(owners: np.ndarray) -> Wire:
        return replace(seats, predictor=learn_rows([*fit, *judge], owners, seats))

    # Bytes of experts are left out of the decision: what is asked here is what a mapping can do.
    rehomed, luffy = (
        plan_mapping(fit, judge, start, w, expert_num_bytes=0, steps_until_next=1).owners for w in (wire(), seats)
    )
    return {
        "vanilla": crossing(count, start, wire(copies="pairs")),
        "vanilla_dedup": crossing(count, start, wire()),
        "luffy_paper": crossing(count, start, wire("luffy_paper")),
        "netmoe": crossing(count, start, wire("netmoe", "router")),
        "vanilla_dedup, re-homed": crossing(count, rehomed, wire()),
        "luffy, experts as dealt": crossing(count, start, seated(start)),
        "luffy": crossing(count, luffy, seated(luffy)),
    }


def expert_shares(steps: list[TraceStep], num_experts: int) -> list[list[list[float]]]:
    """By layer, by rank in a sequence's own order: quartiles over sequences of the share of its tokens' choices."""
    out = []
    for layer in range(steps[0].num_layers):
        counts = np.concatenate([s.counts_by_expert(layer, num_experts) for s in steps])
        counts = counts[counts.sum(1) > 0]
        share = -np.sort(-counts / counts.sum(1, keepdims=True), axis=1)
        out.append(np.quantile(share, (0.25, 0.5, 0.75), axis=0).T.round(4).tolist())
    return out


def run_case(case: Case, data: str, device: str, size: str, out: Path) -> None:
    folder = out / case.name
    result = folder / "result.json"
    if result.exists():
        return
    begin = time.perf_counter()
    train(case, data, device, size, folder)
    files = sorted((folder / "trace").glob("*.npz"))
    late = join_traces([RoutingTrace.load(p) for p in files[-(FIT + JUDGE + COUNT) :]])
    early = join_traces([RoutingTrace.load(p) for p in files[2:4]])
    late.save(folder / "late.npz")
    for p in files:
        p.unlink()
    summary = json.loads((folder / "summary.json").read_text())
    locality = [r["locality"] for r in read_metrics(folder / "metrics.jsonl")[-50:]]
    content = {
        **vars(case),
        "size": size,
        "valid_loss": summary["valid_loss"],
        "environment": summary["environment"],
        "sequence_entropy": float(np.mean([x["sequence_entropy"] for x in locality])),
        "expert_entropy": float(np.mean([x["expert_entropy"] for x in locality])),
        "rows": {n: replay(late, n) for n in RANKS if case.experts % n == 0},
        "expert_shares": {
            f"step {t.steps[0].step}": expert_shares(list(t.steps), t.num_experts) for t in (early, late)
        },
    }
    result.write_text(json.dumps(content, indent=1))
    click.echo(f"{case.name}: loss {content['valid_loss']:.4f}, {time.perf_counter() - begin:.0f} s")


def run_until(deadline: float, case: Case, data: str, device: str, size: str, out: Path) -> None:
    """`run_case`, unless the longest case so far of this worker would not end before `deadline` (of time.time)."""
    if time.time() + LONGEST[0] > deadline:
        return
    begin = time.time()
    run_case(case, data, device, size, out)
    LONGEST[0] = max(LONGEST[0], time.time() - begin)


@click.group()
def main() -> None:
    """Rows that cross ranks."""


@main.command("train")
@click.option("--group", required=True)
@click.option("--data", required=True)
@click.option("--device", default="cuda")
@click.option("--jobs", default=1, help="Trainings side by side on the device.")
@click.option("--budget-seconds", default=1e9, help="Begin nothing that would end later.")
@click.option("--small", is_flag=True, help="A size for the CPU.")
@click.option("--only", default="", help="Only cases whose name holds one of these, comma separated.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def train_command(
    group: str, data: str, device: str, jobs: int, budget_seconds: float, only: str, small: bool, out: Path
) -> None:
    deadline = time.time() + budget_seconds
    chosen = [c for c in cases(group) if any(part in c.name for part in only.split(","))]
    # Processes, since replaying is Python's work and would hold up the other cases of one process.
    with ProcessPoolExecutor(jobs) as pool:
        waiting = [pool.submit(run_until, deadline, c, data, device, SMALL if small else SIZE, out) for c in chosen]
        for result in waiting:
            result.result()


@main.command("table")
@click.option("--out", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--json", "target", required=True, type=click.Path(path_type=Path))
def table_command(out: Path, target: Path) -> None:
    """Collect the cases and print Markdown: rows a token sends and gets back, and their share of vanilla_dedup's."""
    found = [json.loads(p.read_text()) for p in sorted(out.glob("*/result.json"))]
    target.write_text(json.dumps(found, indent=1))
    recipes = ("vanilla", "vanilla_dedup", "luffy_paper", "netmoe", "luffy, experts as dealt", "luffy")
    click.echo("| model, experts, top-k, locality loss | seeds | held-out loss | ranks | " + " | ".join(recipes) + " |")
    click.echo("|---" * (4 + len(recipes)) + "|")
    for key in dict.fromkeys((c["model"], c["experts"], c["top_k"], c["locality"]) for c in found):
        same = [c for c in found if (c["model"], c["experts"], c["top_k"], c["locality"]) == key]
        losses = [c["valid_loss"] for c in same]
        loss = f"{np.mean(losses):.3f}" + (f" ({min(losses):.3f}-{max(losses):.3f})" if len(same) > 1 else "")
        for ranks in same[0]["rows"]:
            cells = []
            for recipe in recipes:
                rows = [[c["rows"][ranks][r] for c in same] for r in (recipe, "vanilla_dedup")]
                mine, dedup = (np.mean([x["dispatch"] + x["combine"] for x in r]) for r in rows)
                cells.append(f"{mine:.2f} ({mine / dedup:.2f})")
            name = f"{key[0]}, {key[1]}, {key[2]}, {key[3]}"
            click.echo(f"| {name} | {len(same)} | {loss} | {ranks} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
