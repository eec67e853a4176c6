"""What benchmarks/local_routers.py found, in numbers and pictures."""

from __future__ import annotations

from typing import Any

import numpy as np
from matplotlib.figure import Figure


def summarised(result: dict[str, Any]) -> dict[str, Any]:
    """A result without its matrices: rows of a token, means over layers and by layer, at each number of ranks."""
    out = {k: v for k, v in result.items() if k not in ("traffic", "telling")}
    for n, matrices in sorted(result["traffic"].items(), key=lambda item: -int(item[0])):
        traffic, N = np.array(matrices), int(n)
        touched, home = traffic.sum((1, 2)), np.trace(traffic, axis1=1, axis2=2)
        off = traffic * (1 - np.eye(N))
        ranks = {
            "touched": float(touched.mean()),
            "away": float((touched - home).mean()),
            "away_by_layer": (touched - home).round(4).tolist(),
            "busiest": float(np.maximum(off.sum(1), off.sum(2)).max(1).mean() * N),  # as a number of rows a token
        }
        out.setdefault("ranks", {})[n] = ranks
    first = max(out["ranks"], key=int)
    return out | {"away": out["ranks"][first]["away"], "busiest": out["ranks"][first]["busiest"]}


def named(run: dict[str, Any]) -> str:
    """What sets a run apart from the others of its size."""
    o = run["options"]
    parts = [f"{o['num_groups']} groups, {o['top_k_groups']} a token"] if "num_groups" in o else []
    parts += [f"{o['seat_loss_form']} {o['seat_loss']:g}"] if "seat_loss" in o else []
    parts += [f"locality loss {o['locality_loss']:g}"] if "locality_loss" in o else []
    return ", ".join(parts) or "none"


def against_none(run: dict[str, Any], runs: list[dict[str, Any]]) -> tuple[float, float, float]:
    """Held-out loss above the run without a seat loss (of its seed, else of any); rows that leave the seat, and the
    busiest rank's, over what vanilla_dedup sends there."""
    alike = [r for r in runs if r["size"] == run["size"] and named(r) == "none" and r["steps"] == run["steps"]]
    alike = [r for r in alike if r.get("mixed") == run.get("mixed")]
    if not alike:
        return float("nan"), float("nan"), float("nan")
    same = [r for r in alike if r["options"]["seed"] == run["options"]["seed"]] or alike
    N = max(map(int, run["ranks"]))
    dealt = np.mean([r["ranks"][str(N)]["touched"] for r in alike]) * (N - 1) / N
    return run["loss"] - same[0]["loss"], run["away"] / dealt, run["busiest"] / dealt


def pareto(runs: list[dict[str, Any]]) -> Figure:
    """Loss against rows, a panel a model; hollow: the busiest rank."""
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    for axes, size in zip(figure.subplots(1, 2), ("64x8", "16x2"), strict=True):
        chosen = [r for r in runs if r["size"] == size and r["steps"] >= 2000]
        names = sorted({(bool(r.get("mixed")), named(r)) for r in chosen}, key=lambda n: (n[0], n[1] != "none", n[1]))
        for i, (mixed, name) in enumerate(names):
            own = [r for r in chosen if named(r) == name and bool(r.get("mixed")) == mixed]
            gaps, shares, busiest = zip(*(against_none(r, runs) for r in own), strict=True)
            label = f"{'mixed documents: ' if mixed else ''}{name} ({len(own)} seed{'s' * (len(own) > 1)})"
            axes.scatter(shares, gaps, s=38, color=f"C{i}", marker="s" if mixed else "o", label=label)
            axes.scatter(busiest, gaps, s=38, facecolors="none", edgecolors=f"C{i}", marker="s" if mixed else "o")
        axes.axhspan(-0.02, 0.02, color="0.93", zorder=0)
        axes.axhline(0, color="0.7", linewidth=0.8, zorder=0)
        experts, top_k = size.split("x")
        axes.set(title=f"{experts} experts, top-{top_k}", xlim=(0, None), ylabel="held-out loss above none's (nats)",
                 xlabel="rows that leave the seat, over vanilla_dedup's (hollow: busiest rank)")  # fmt: skip
        axes.legend(frameon=False, fontsize=7.5)
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def in_depth(runs: list[dict[str, Any]]) -> Figure:
    """Rows away over training, by layer, and the loss by domain, of seed 0 of 64 experts."""
    figure = Figure(figsize=(13, 4.2), layout="constrained")
    over_steps, by_layer, by_domain = figure.subplots(1, 3)
    chosen = [r for r in runs if r["size"] == "64x8" and r["steps"] >= 2000 and r["options"]["seed"] == 0]
    chosen = [r for r in chosen if not r.get("mixed")]
    none = next(r for r in chosen if named(r) == "none")
    domains = sorted(none["domains"], key=none["domains"].get)
    for i, r in enumerate(sorted(chosen, key=lambda r: (named(r) != "none", named(r)))):
        steps = [step for step, _, _ in r["rows_over_steps"]]
        over_steps.plot(steps, [np.mean(away) for _, away, _ in r["rows_over_steps"]], color=f"C{i}", label=named(r))
        by_layer.plot(r["ranks"]["8"]["away_by_layer"], color=f"C{i}", marker="o", markersize=4)
        if r is not none:
            gaps = [r["domains"][d] - none["domains"][d] for d in domains]
            by_domain.plot(gaps, range(len(domains)), "o", color=f"C{i}", markersize=5)
    over_steps.set(xlabel="step", ylabel="rows a token that leave the seat", ylim=(0, None), title="Over training")
    over_steps.legend(frameon=False, fontsize=8)
    by_layer.set(xlabel="MoE layer", ylim=(0, None), title="By layer, at the end")
    by_domain.set(yticks=range(len(domains)), yticklabels=domains, title="Held-out loss above none's, by domain (nats)")
    by_domain.axvline(0, color="0.7", linewidth=0.8)
    by_domain.tick_params(labelsize=7.5)
    for axes in (over_steps, by_layer, by_domain):
        axes.spines[["top", "right"]].set_visible(False)
    return figure
