"""How far from the optimum are the planner's placements, on routing of trained models and on random routing?

    python benchmarks/planner_quality.py --trace runs/a/late.npz --trace runs/b/late.npz --out docs/results/FILE.json

Every layer of every recorded step is a placement problem. Under equal sequence counts the exact optimum is an
assignment problem (scipy's `linear_sum_assignment`, the strategy `exact`). Under token budgets it is an integer
programme; its linear relaxation bounds it from below, so the gap to that bound is the most the gap to the optimum can
be. Bytes are those of combine plus the look-ahead's dispatch, weighted by link; `best` is also checked never to exceed
staying, and its balance.
"""

import json
import time
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from scipy.optimize import linprog
from scipy.sparse import coo_matrix, vstack

from luffy.plan.balance import budgets
from luffy.plan.cost import AttentionCost
from luffy.plan.placement import Balance, PlacementProblem, plan_placement
from luffy.plan.replay import Wire, replay_step, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import RoutingTrace, TraceStep


def random_like(trace: RoutingTrace, seed: int) -> RoutingTrace:
    """The same sequences with experts drawn at random, evenly: nothing to gain but chance."""
    rng = np.random.default_rng(seed)

    def shuffled(step: TraceStep) -> TraceStep:
        draw = rng.random((*step.chosen.shape[:2], trace.num_experts), dtype=np.float32)
        chosen = draw.argpartition(trace.top_k, axis=2)[:, :, : trace.top_k].astype(np.int16)
        return replace(step, chosen=chosen, foreseen=chosen[1:])

    return replace(trace, steps=tuple(shuffled(s) for s in trace.steps[:2]))


def problems(trace: RoutingTrace, links: Topology) -> list[PlacementProblem]:
    owners = spread_evenly(trace.num_layers, trace.num_experts, links.world_size)
    wire = Wire(links, trace.row_num_bytes, "best", "router", attention=AttentionCost(trace.hidden_size))
    return [layer.problem for step in trace.steps for layer in replay_step(step, owners, wire)]


def relaxation(problem: PlacementProblem) -> float:
    """The least weighted bytes of any fractional placement within the token and attention budgets."""
    S, N = problem.num_sequences, problem.num_ranks
    cost = (problem.rows @ problem.topology.weight_matrix()).astype(np.float64) * problem.row_num_bytes  # [S, N]
    scale = cost.max()
    limit = budgets(problem)
    s, r = np.divmod(np.arange(S * N), N)
    flops = problem.attention.sequence_flops(problem.lengths)
    loads = [coo_matrix((w[s] / w.sum(), (r, np.arange(S * N))), (N, S * N)) for w in (problem.lengths, flops)]
    bounds = [np.full(N, limit.tokens / problem.lengths.sum()), np.full(N, limit.attention_flops / flops.sum())]
    each = coo_matrix((np.ones(S * N), (s, np.arange(S * N))), (S, S * N))
    answer = linprog(
        cost.ravel() / scale, A_ub=vstack(loads), b_ub=np.concatenate(bounds), A_eq=each, b_eq=np.ones(S),
        bounds=(0, 1), method="highs",
    )  # fmt: skip
    assert answer.success, answer.message
    return float(answer.fun * scale)


def measure(trace: RoutingTrace, links: Topology) -> dict[str, object]:
    """Weighted bytes over the optimum (equal counts) or over its lower bound (token budgets), by strategy."""
    weigh = links.weighted_bytes
    out: dict[str, object] = {}
    asked = problems(trace, links)
    for mode in ("sequences", "tokens"):
        ratios: dict[str, list[float]] = {"stay": [], "luffy_paper": [], "best": []}
        seconds = []
        for problem in asked:
            posed = replace(problem, balance=Balance(mode))  # type: ignore[arg-type]
            exact = plan_placement("exact", posed) if mode == "sequences" else None
            bound = weigh(exact.num_bytes) if exact else relaxation(posed)
            for strategy, values in ratios.items():
                begin = time.perf_counter()
                plan = plan_placement(strategy, posed)
                if strategy == "best":
                    seconds.append(time.perf_counter() - begin)
                    plan.check(posed)
                    assert weigh(plan.num_bytes) <= weigh(plan.stay_num_bytes)
                values.append(weigh(plan.num_bytes) / bound)
        out[mode] = {
            strategy: {"median": float(np.median(v)), "worst": float(np.max(v))} for strategy, v in ratios.items()
        } | {"problems": len(asked), "best_milliseconds": 1e3 * float(np.median(seconds))}
    return out


@click.command()
@click.option("--trace", "traces", multiple=True, required=True, type=click.Path(path_type=Path))
@click.option("--out", required=True, type=click.Path(path_type=Path))
def main(traces: tuple[Path, ...], out: Path) -> None:
    """Measure and print Markdown."""
    rows = []
    click.echo("| routing | ranks | balance | problems | stay | luffy_paper | best, median | best, worst | best, ms |")
    click.echo("|---|---|---|---|---|---|---|---|---|")
    loaded = {p.stem: RoutingTrace.load(p) for p in traces}
    loaded["random"] = random_like(next(iter(loaded.values())), 0)
    for name, trace in loaded.items():
        for links in (Topology.flat(8), Topology.flat(16), Topology(16, 4, 8e9, 1.25e9)):
            result = measure(trace, links)
            ranks = f"{links.num_nodes}x{links.ranks_per_node}" if links.num_nodes > 1 else str(links.world_size)
            rows.append({"trace": name, "ranks": ranks, **result})
            for mode in ("sequences", "tokens"):
                r = result[mode]
                click.echo(
                    f"| {name} | {ranks} | {mode} | {r['problems']} | {r['stay']['median']:.3f} | "
                    f"{r['luffy_paper']['median']:.3f} | {r['best']['median']:.4f} | {r['best']['worst']:.4f} | "
                    f"{r['best_milliseconds']:.2f} |"
                )
    out.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
