"""The paper's Figures 3 and 10(a), from our runs.

    python benchmarks/migration_figures.py --results docs/results/migration_bytes.json \
        --trace runs/a/late.npz --figures docs/figures

Figure 3: how unevenly one sequence uses the experts, early in training and late, without and with the locality loss.
Figure 10(a): Algorithm 1's number of candidates q against the combine rows that cross ranks and the attention
operations of all ranks and of the busiest (padded batches, as in the paper; those of packed ones do not depend on q).
"""

import json
from dataclasses import replace
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

from luffy.plan.cost import AttentionCost
from luffy.plan.placement import PlacementProblem, plan_placement
from luffy.plan.replay import Wire, replay_step, spread_evenly
from luffy.plan.topology import Topology
from luffy.plan.trace import RoutingTrace

RANKS = 16
CANDIDATES = (1, 2, 3, 4, 6, 8, 12, 16)
COLOURS = ("#9aa5b1", "#0072b2", "#e69f00", "#009e73")


def draw_shares(cases: list[dict], path: Path) -> None:
    """Share of a sequence's choices that its 1st, 2nd, ... favourite expert gets: median over sequences and layers."""
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    curves = [(cases[0], 0)] + [(c, 1) for c in cases]
    for (case, when), colour in zip(curves, COLOURS, strict=False):
        name = list(case["expert_shares"])[when]
        shares = np.array(case["expert_shares"][name])  # [layers, E, quartiles]
        middle = np.median(shares[:, :, 1], axis=0)
        places = np.arange(1, len(middle) + 1)
        axes.plot(
            places, middle, marker="o", markersize=3, color=colour, label=f"locality loss {case['locality']}, {name}"
        )
        axes.fill_between(places, shares[:, :, 0].min(0), shares[:, :, 2].max(0), color=colour, alpha=0.12)
    axes.axhline(1 / len(middle), color="#52606d", linewidth=0.8, linestyle="--", label="all experts alike")
    axes.set(xlabel="a sequence's experts, most used first", ylabel="share of its choices", ylim=0)
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


def by_candidates(trace: RoutingTrace) -> list[dict[str, float]]:
    """For each q: combine rows that cross, and the slowest rank's attention operations, over those of staying."""
    cost = AttentionCost(trace.hidden_size)
    wire = Wire(Topology.flat(RANKS), trace.row_num_bytes, "stay", attention=cost, padded=True)
    owners = spread_evenly(trace.num_layers, trace.num_experts, RANKS)
    asked = [layer.problem for step in trace.steps for layer in replay_step(step, owners, wire)]

    def operations(problem: PlacementProblem, homes: np.ndarray) -> np.ndarray:
        held = [problem.lengths[homes == r] for r in range(RANKS)]
        return np.array([float(cost.padded_flops(len(n), n.max(initial=0))) for n in held])

    out = []
    for q in CANDIDATES:
        ratios = []
        for problem in asked:
            plan = plan_placement("luffy_paper", problem, num_candidates=q)
            now, then = (operations(problem, homes) for homes in (problem.home_rank, plan.new_home))
            rows = sum(plan.num_bytes[1:]) / sum(plan.stay_num_bytes[1:])
            ratios.append((rows, then.sum() / now.sum(), then.max() / now.max()))
        medians = (float(m) for m in np.median(ratios, axis=0))
        out.append(dict(zip(("q", "rows", "all_ranks", "busiest_rank"), (q, *medians), strict=True)))
    best = [plan_placement("best", replace(p, layout="packed")) for p in asked]
    out.append({"q": 0, "rows": float(np.median([sum(b.num_bytes[1:]) / sum(b.stay_num_bytes[1:]) for b in best]))})
    return out


def draw_candidates(points: list[dict[str, float]], path: Path) -> None:
    figure = Figure(figsize=(6.4, 3.6), layout="constrained")
    axes = figure.subplots()
    *greedy, best = points
    q = [p["q"] for p in greedy]
    axes.plot(q, [p["rows"] for p in greedy], marker="o", color="#0072b2", label="combine rows that cross ranks")
    axes.plot(q, [p["all_ranks"] for p in greedy], marker="s", color="#e69f00", label="attention, all ranks")
    axes.plot(q, [p["busiest_rank"] for p in greedy], marker="^", color="#009e73", label="attention, busiest rank")
    axes.axhline(best["rows"], color="#0072b2", linewidth=0.8, linestyle="--", label="rows, strategy `best`")
    axes.set(xlabel="candidates q", ylabel="relative to not moving")
    axes.legend(frameon=False, fontsize=8)
    figure.savefig(path, dpi=160)


@click.command()
@click.option("--results", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--trace", required=True, type=click.Path(path_type=Path))
@click.option("--figures", required=True, type=click.Path(path_type=Path))
def main(results: Path, trace: Path, figures: Path) -> None:
    """Draw both figures and print the numbers of the second."""
    cases = json.loads(results.read_text())
    first = [c for c in cases if c["seed"] == 0 and c["model"] == "moe-gpt2" and (c["experts"], c["top_k"]) == (16, 2)]
    draw_shares(first, figures / "expert_share.png")
    points = by_candidates(RoutingTrace.load(trace))
    draw_candidates(points, figures / "candidates.png")
    click.echo(json.dumps(points, indent=1))


if __name__ == "__main__":
    main()
