"""`luffy plan`: what every recipe would put on the links of a cluster, from a recorded trace.

The trace comes from `luffy train --trace-every`; the cluster need not exist. See `luffy.plan.prediction` for what is
counted (bytes) and what is modelled (seconds). Seats are predicted from the features of a trace, by a predictor that is
fitted to steps that are not counted.
"""

from __future__ import annotations

import json
from dataclasses import asdict, replace
from pathlib import Path

from rich.console import Console

from luffy.errors import UserError
from luffy.inputs import keep_apart
from luffy.plan.advice import (
    Advice,
    Alternative,
    advise,
    group_sum_seconds,
    offloading,
    pipeline,
    sharded,
    slowest_of_groups,
)
from luffy.plan.cost import AttentionCost
from luffy.plan.prediction import Prediction, counted_steps, predict
from luffy.plan.replay import Wire, spread_evenly
from luffy.plan.residency import expert_costs
from luffy.plan.topology import Topology, parse_topology
from luffy.plan.trace import RoutingTrace, join_traces
from luffy.ranges import NOT_NEGATIVE, POSITIVE
from luffy.recipes import Recipe, get_recipe
from luffy.report.plan_figure import build_figure
from luffy.report.style import draw, save_png
from luffy.report.units import format_seconds
from luffy.train.metrics import write_json_atomic
from luffy.train.plan_tables import show_alternatives, show_predictions
from luffy.wire_format import parse_wire

EXPERT_FLOPS = 1e14
MOST_STEPS = 12  # the newest of a folder: routers move, and old steps flatter


def load_trace(path: Path) -> RoutingTrace:
    """One file, or the newest steps of a folder of them (a run's `trace`, or the run itself)."""
    if path.is_dir():
        folder = path / "trace" if (path / "trace").is_dir() else path
        files = sorted(folder.glob("*.npz"))[-MOST_STEPS:]
        if not files:
            raise UserError(f"--trace {path}: holds no .npz files; record some with luffy train --trace-every 10")
        try:
            return join_traces([RoutingTrace.load(f) for f in files])
        except ValueError as error:
            raise UserError(f"--trace {path}: {error}; name the folder of one run") from error
    if not path.exists():
        raise UserError(f"--trace {path}: no such file; record one with luffy train --trace-every 10")
    return RoutingTrace.load(path)


def wire_for(
    recipe: Recipe, trace: RoutingTrace, topology: Topology, padded: bool, expert_flops: float = EXPERT_FLOPS
) -> Wire:
    """expert_flops: operations per second of one rank's experts, which shadows are weighed by."""
    num_bytes = int(trace.about.get("expert_num_bytes", 0))
    itemsize = trace.row_num_bytes // trace.hidden_size
    costs = expert_costs(topology, expert_flops, trace.hidden_size, num_bytes // itemsize, itemsize)
    return Wire(
        topology,
        trace.row_num_bytes,
        recipe.placement,
        "router" if recipe.look_ahead else "none",
        recipe.copies,
        AttentionCost(trace.hidden_size),
        padded,
        residency=recipe.residency,
        expert_num_bytes=num_bytes,
        expert_costs=costs,
        row_bytes=recipe.wire_spec.row_bytes(trace.hidden_size, itemsize) if recipe.wire != "model" else None,
        seats="predicted" if recipe.seats == "learnt" else "as-read",
    )


def predict_recipes(
    trace: RoutingTrace,
    topology: Topology,
    recipes: list[Recipe],
    padded: bool = False,
    expert_flops: float = EXPERT_FLOPS,
) -> list[Prediction]:
    """One prediction a recipe, experts beginning as a model deals them. `topology`: of one expert-parallel group.

    Raises UserError where the trace cannot fill the group.
    """
    N, E = topology.world_size, trace.num_experts
    fewest = min(len(step.lengths) for step in trace.steps)
    if fewest < N:
        raise UserError(
            f"--topology: the trace has {fewest} sequences a step, fewer than the {N} ranks that share experts; record "
            f"one with --batch-size {N} or more, or give a smaller --ep-size"
        )
    moved = [r.name for r in recipes if r.residency != "static"]
    if moved and not trace.about.get("expert_num_bytes"):
        raise UserError(
            f"--trace: it does not say how large an expert is, which {', '.join(moved)} would send; record it again, "
            "or leave them out of --recipes"
        )
    owners = spread_evenly(trace.num_layers, E, N)
    return [
        predict(
            r.name,
            trace.steps,
            owners,
            wire_for(r, trace, topology, padded, expert_flops),
            rehome=r.rehome_every > 0,
        )
        for r in recipes
    ]


def group_of(topology: Topology, num_experts: int, ep_size: int | None) -> Topology:
    """The links of one expert-parallel group: `ep_size` consecutive ranks, as many as share the experts evenly by
    default. The groups of a cluster are alike, each on nodes, or a part of a node, of its own.

    Raises UserError where they would not be.
    """
    N, width = topology.world_size, topology.ranks_per_node
    if ep_size is None:
        fitting = [n for n in range(1, min(N, num_experts) + 1) if N % n == 0 and num_experts % n == 0]
        ep_size = max(n for n in fitting if n % width == 0 or width % n == 0)
        if ep_size == 1 < N:
            raise UserError(f"--topology: {N} ranks cannot share the trace's {num_experts} experts evenly")
    if ep_size < 1 or num_experts % ep_size:
        raise UserError(f"--ep-size {ep_size}: cannot share the trace's {num_experts} experts evenly; name a divisor")
    if N % ep_size or (ep_size % width and width % ep_size):
        raise UserError(f"--ep-size {ep_size}: groups of {ep_size} do not fill {N} ranks in nodes of {width} evenly")
    return replace(topology, world_size=ep_size, ranks_per_node=min(width, ep_size))


def advice_for(
    predictions: list[Prediction],
    trace: RoutingTrace,
    group: Topology,
    padded: bool,
    compute_seconds: float | None,
    wire: str | None,
) -> tuple[Advice, list[Alternative]]:
    """Which recipe to take on one group's links, and what other ways to train would send there."""
    alternatives = []
    n = group.ranks_per_node
    if group.num_nodes > 1 and trace.num_experts % n == 0:
        node = replace(group, world_size=n)
        inside = predict_recipes(trace, node, [get_recipe("vanilla_dedup")], padded)[0]
        alternatives.append(pipeline(inside, group, tokens_a_step(trace), trace.row_num_bytes))
    if (weights := experts_num_bytes(trace)) and group.world_size > 1:
        alternatives += [sharded(group, weights), offloading(group, weights)]
    free = wire in (None, "model")
    recipes = [get_recipe(p.recipe) for p in predictions]
    exact = [r.name for r in recipes if free and r.wire == "model" and r.condense == "none" and not r.auto]
    # What condenses is counted without condensation, and auto is one of the others: neither is advised.
    weighed = [p for p, r in zip(predictions, recipes, strict=True) if r.condense == "none" and not r.auto]
    return advise(weighed or predictions, exact, alternatives, compute_seconds), alternatives


def tokens_a_step(trace: RoutingTrace) -> float:
    """Mean over the steps that are counted."""
    counted = counted_steps(trace.steps)
    return sum(int(s.lengths.sum()) for s in counted) / len(counted)


def experts_num_bytes(trace: RoutingTrace) -> int:
    """Of the weights of all experts of all layers; 0 where the trace does not say."""
    return int(trace.about.get("expert_num_bytes", 0)) * trace.num_experts * trace.num_layers


def run_plan(
    trace: Path,
    spec: str,
    recipes: str,
    layout: str,
    compute_seconds: float | None,
    expert_flops: float,
    target: Path | None,
    figure: Path | None,
    ep_size: int | None = None,
    wire: str | None = None,
) -> None:
    """What `luffy plan` does: read, predict, print, and write what was asked for."""
    NOT_NEGATIVE.check("--compute-seconds", compute_seconds)
    POSITIVE.check("--expert-flops", expert_flops)
    for option, written in (("--json", target), ("--figure", figure)):
        if written is not None:
            keep_apart(written, {"--trace": trace}, option)
    topology = parse_topology(spec, "--topology")
    chosen = [get_recipe(name.strip()) for name in recipes.split(",") if name.strip()]
    if wire is not None:
        parse_wire(wire)
        chosen = [r if r.moves else replace(r, wire=wire) for r in chosen]  # rows that carry residuals stay as they are
    if not chosen:
        raise UserError("--recipes names no recipe; leave it out for all of them")
    recorded = load_trace(trace)
    group = group_of(topology, recorded.num_experts, ep_size)
    predictions = predict_recipes(recorded, group, chosen, layout == "padded", expert_flops)
    advice, alternatives = advice_for(predictions, recorded, group, layout == "padded", compute_seconds, wire)
    console = Console(soft_wrap=True, width=max(110, Console().width))  # a narrow terminal wraps, and cuts no number
    console.print(f"advice (predicted): {advice.line}\n")
    counted, tokens = counted_steps(recorded.steps), tokens_a_step(recorded)
    console.print(
        f"{recorded.about.get('model', 'model')}: {recorded.num_layers} MoE layers, {recorded.num_experts} experts, "
        f"top-{recorded.top_k}; steps {counted[0].step}-{counted[-1].step}, {tokens:.0f} tokens each; "
        f"{group.world_size} ranks"
        + ("" if group == topology else f", one of {topology.world_size // group.world_size} groups that share experts")
    )
    show_predictions(predictions, compute_seconds, console)
    if any(get_recipe(p.recipe).rehome_every and not p.rehomed for p in predictions):
        console.print("experts stay as dealt: re-homing needs a trace of at least 4 steps")
    named = [get_recipe(p.recipe) for p in predictions]
    if any(r.seats != "as-read" for r in named):
        if any(s.features is None for s in recorded.steps):
            console.print("sequences stay as dealt: the trace holds no features to predict seats from; record it again")
        elif len(counted) == len(recorded.steps):
            console.print("sequences stay as dealt: predicting their seats needs a trace of at least 2 steps")
    if alike := [p.recipe for p in predictions if get_recipe(p.recipe).condense != "none"]:
        console.print(f"{', '.join(alike)}: counted without condensation; a trace of routing does not say who is alike")
    groups = topology.world_size // group.world_size
    if groups > 1 and (weights := experts_num_bytes(recorded)):
        seconds = group_sum_seconds(group, groups, weights)
        console.print(f"gradients of experts, summed between the {groups} groups, take {format_seconds(seconds)} more")
    slowest = {p.recipe: slowest_of_groups(p.step_seconds, groups) for p in predictions}
    if groups > 1:
        mean, last = (s[advice.recipe] for s in ({p.recipe: p.exchange_seconds for p in predictions}, slowest))
        console.print(
            f"a step ends with the slowest of the {groups} groups: {advice.recipe}'s links are then busy for "
            f"{format_seconds(last)}, not {format_seconds(mean)} as in the mean group"
        )
    if alternatives:
        taken = next(p for p in predictions if p.recipe == advice.recipe)
        show_alternatives(alternatives, taken, tokens, console)
    if target is not None:
        content = {
            "provenance": "bytes counted by replay, seconds predicted",
            "trace": str(trace),
            "topology": spec,
            "ep_size": group.world_size,
            "compute_seconds": compute_seconds,
            "wire": wire,
            "predictions": [asdict(p) for p in predictions],
            "advice": asdict(advice),
            "alternatives": [asdict(a) for a in alternatives],
            "groups": groups,
            "slowest_group_seconds": slowest,
        }
        write_json_atomic(target, json.loads(json.dumps(content)))
    if figure is not None:
        png, _ = draw(lambda: build_figure(predictions, spec))
        save_png(figure, png)
