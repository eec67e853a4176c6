"""How fast is the placement planner, and how far from the optimum?

    python benchmarks/planner_speed.py                      # S in 64..4096, N in 8..1024, synthetic traces
    python benchmarks/planner_speed.py --rounds 0 1 2 4 8   # the quality / time curve
    python benchmarks/planner_speed.py --trace counts.npz   # recorded counts [layers, S, N], lengths [S]

Times are of one call of `plan_placement` on a freshly built problem (nothing cached), median and interquartile
range over repeats that cycle through the layers; building and validating the problem is timed beside it. The
optimum comes from `exact` up to --exact-limit sequences and, beyond, from `best` run until it proves optimality.
Without a trace, counts are SYNTHETIC (luffy/plan/synthetic.py: Dirichlet spread, favourite share 0.25-0.4, top-2,
eight domains).
"""

import argparse
import gc
import json
import platform
import statistics
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import scipy

from luffy.errors import UserError
from luffy.plan.placement import Balance, PlacementProblem, plan_placement, weighted_bytes
from luffy.plan.synthetic import synthetic_counts
from luffy.plan.topology import Topology, parse_rate

SEQUENCES = (64, 256, 1024, 4096)
RANKS = (8, 16, 64, 256, 1024)


def build_problems(args: argparse.Namespace) -> Iterator[list[PlacementProblem]]:
    """One list of problems, a layer each, for every size: those of the trace, or synthetic ones."""
    if args.trace:
        yield load_trace(args)
        return
    for S in args.sequences:
        for N in args.ranks:
            if S >= N or args.all:
                counts = np.stack([synthetic_counts(S, N, seed=layer) for layer in range(args.layers)])
                lengths = np.full(S, 1024)
                if args.uneven:
                    lengths = np.clip(np.random.default_rng(0).lognormal(6.3, 0.5, S), 16, 4096).astype(np.int64)
                    counts = counts * lengths[:, None] // 1024
                yield [problem_of(layer, lengths, np.arange(S) % N, args) for layer in counts]


def load_trace(args: argparse.Namespace) -> list[PlacementProblem]:
    try:
        with np.load(args.trace) as trace:
            counts, lengths = trace["counts"], trace["lengths"]
            S, N = counts.shape[1:]
            home_rank = trace["home_rank"] if "home_rank" in trace else np.arange(S) % N
            return [problem_of(layer, lengths, home_rank, args) for layer in counts]
    except (OSError, KeyError, ValueError) as error:
        raise UserError(f"--trace {args.trace}: needs arrays counts [layers, S, N] and lengths [S]: {error}") from None


def problem_of(
    counts: np.ndarray, lengths: np.ndarray, home_rank: np.ndarray, args: argparse.Namespace
) -> PlacementProblem:
    N = counts.shape[1]
    width = args.ranks_per_node if args.ranks_per_node and N % args.ranks_per_node == 0 else N
    topology = Topology(N, width, parse_rate(args.intra, "--intra"), parse_rate(args.inter, "--inter"))
    balance = Balance("tokens", 0.1) if args.uneven else Balance("sequences")
    return PlacementProblem(counts, lengths, home_rank, topology, args.row_bytes, balance=balance)


def time_call(problems: list[PlacementProblem], repeats: int, **options: Any) -> tuple[list[float], list[float]]:
    """Microseconds of building the problem and of planning, one pair for each repeat."""
    build, plan = [], []
    for i in range(-3, repeats):  # the first three warm caches and allocators up
        start = time.perf_counter()
        problem = replace(problems[i % len(problems)])
        built = time.perf_counter()
        plan_placement("best", problem, **options)
        if i >= 0:
            build.append((built - start) * 1e6)
            plan.append((time.perf_counter() - built) * 1e6)
    return build, plan


def quality(problems: list[PlacementProblem], exact_limit: int) -> list[dict[str, Any]]:
    """For each problem: weighted bytes of stay, of luffy_paper and of the optimum (or a bound), and its source."""
    rows = []
    for problem in problems:
        start = time.perf_counter()
        if problem.balance.mode == "tokens":
            source, optimum = "bound", weighted_bytes(problem, problem.rows.argmax(axis=1))
        elif problem.num_sequences <= exact_limit:
            source, optimum = "exact", weighted_bytes(problem, plan_placement("exact", problem).new_home)
        else:
            plan = plan_placement("best", problem, rounds=10_000)
            source, optimum = (
                "best, proved" if plan.optimal else "best, not proved",
                weighted_bytes(problem, plan.new_home),
            )
        seconds = time.perf_counter() - start
        paper = weighted_bytes(problem, plan_placement("luffy_paper", problem).new_home)
        stay = weighted_bytes(problem, problem.home_rank)
        rows.append({"optimum": optimum, "source": source, "seconds": seconds, "paper": paper, "stay": stay})
    return rows


def measure(problems: list[PlacementProblem], args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    reference = quality(problems, args.exact_limit)
    first = problems[0]
    for rounds in args.rounds or [None]:
        options = {} if rounds is None else {"rounds": rounds}
        build, plan = time_call(problems, args.repeats, **options)
        quartiles = statistics.quantiles(plan, n=4)
        costs = [weighted_bytes(p, plan_placement("best", p, **options).new_home) for p in problems]

        def mean_excess(values: list[int]) -> float:
            return statistics.mean(v / max(1, r["optimum"]) - 1 for v, r in zip(values, reference, strict=True))

        yield {
            "sequences": first.num_sequences,
            "ranks": first.num_ranks,
            "ranks_per_node": first.topology.ranks_per_node,
            "rounds": "auto" if rounds is None else rounds,
            "plan_microseconds": statistics.median(plan),
            "plan_iqr_microseconds": quartiles[2] - quartiles[0],
            "build_microseconds": statistics.median(build),
            "gap": mean_excess(costs),
            "paper_gap": mean_excess([r["paper"] for r in reference]),
            "stay_gap": mean_excess([r["stay"] for r in reference]),
            "reference": reference[0]["source"],
            "reference_milliseconds": statistics.median(r["seconds"] for r in reference) * 1e3,
            "layers": len(problems),
        }


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sequences", type=int, nargs="+", default=SEQUENCES)
    parser.add_argument("--ranks", type=int, nargs="+", default=RANKS)
    parser.add_argument("--all", action="store_true", help="also sizes with fewer sequences than ranks")
    parser.add_argument("--ranks-per-node", type=int, default=0, help="0: one node (default)")
    parser.add_argument("--intra", default="64gbit", help="rate inside a node (default 64gbit)")
    parser.add_argument("--inter", default="10gbit", help="rate between nodes (default 10gbit)")
    parser.add_argument("--row-bytes", type=int, default=1536)
    parser.add_argument("--rounds", type=int, nargs="+", help="rounds of exchange; several give the curve")
    parser.add_argument("--uneven", action="store_true", help="log-normal lengths, token budgets; gap is to a bound")
    parser.add_argument("--layers", type=int, default=3, help="synthetic layers per size (default 3)")
    parser.add_argument("--repeats", type=int, default=31)
    parser.add_argument("--exact-limit", type=int, default=1024, help="most sequences to give to `exact`")
    parser.add_argument("--trace", help="npz with counts [layers, S, N] and lengths [S]")
    parser.add_argument("--out", type=Path, help="write JSON here")
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    source = f"trace {args.trace}" if args.trace else "SYNTHETIC traces"
    print(f"best, {source}; gaps are weighted bytes above the optimum, mean over layers")
    print(f"{'S':>5} {'N':>5} {'node':>5} {'rounds':>6} {'plan us':>9} {'IQR':>7} {'build us':>8} "
          f"{'gap':>8} {'paper':>7} {'stay':>7}  optimum by")  # fmt: skip
    results = []
    gc.disable()
    try:
        for problems in build_problems(args):
            for row in measure(problems, args):
                results.append(row)
                print(
                    f"{row['sequences']:>5} {row['ranks']:>5} {row['ranks_per_node']:>5} {row['rounds']:>6} "
                    f"{row['plan_microseconds']:>9.0f} {row['plan_iqr_microseconds']:>7.0f} "
                    f"{row['build_microseconds']:>8.0f} {row['gap']:>8.3%} {row['paper_gap']:>7.2%} "
                    f"{row['stay_gap']:>7.1%}  {row['reference']}, {row['reference_milliseconds']:.1f} ms",
                    flush=True,
                )
            gc.collect()
    except UserError as error:
        raise SystemExit(f"planner_speed: {error}") from None
    if args.out:
        machine = {"processor": platform.processor(), "python": platform.python_version()}
        versions = {"numpy": np.__version__, "scipy": scipy.__version__}
        report = {"traces": source, "machine": machine | versions, "row_num_bytes": args.row_bytes, "results": results}
        args.out.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
