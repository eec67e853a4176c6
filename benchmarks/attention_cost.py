"""How well does the cost model of attention predict? Figure 10(b) of arXiv 2411.15419, on the device at hand.

    python benchmarks/attention_cost.py --device cpu --out docs/results/attention_cost.json \\
        --figure docs/figures/attention_cost.png

For attention modules of several widths and kinds: time forward and backward on batches of many (B, L), fit the cost
model to some of them, and compare what it predicts with what the others took. Three fits of the same samples:

* `one_rate`: the paper's formula as it is, P and an overhead from batches of the layout it then predicts;
* `two_rates`: the same with scores at a rate of their own, where that halves the squared error (what training does);
* `carried`: the paper's formula with P from padded batches, predicting packed ones, and the other way round.

Everything here is measured on one device. What else runs on the machine shows as error, hence the load average in the
JSON. The error is |predicted - measured| / measured
of batches that were not fitted. The paper reports about 5%.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from matplotlib.figure import Figure

from luffy.config import ModelConfig, model_preset
from luffy.model.profile import AttentionProfile, fit_samples, profile_attention
from luffy.plan.cost import SCORE_COST_ONE
from luffy.report.style import BLUE, GREEN, GREY, MUTED, ORANGE, RED, draw, save_png, titles
from luffy.train.metrics import describe_machine

# (preset, changes, largest batch in tokens): what a rank of each device could hold, and what time allows.
CASES: dict[str, list[tuple[str, dict[str, int], int]]] = {
    "cpu": [
        ("moe-gpt2-tiny", {}, 4096),
        ("moe-gpt2-tiny", {"hidden_size": 256}, 4096),
        ("moe-gpt2", {"max_sequence_length": 512}, 2048),
        ("moe-bert-large-tiny", {}, 4096),
        ("moe-transformer-xl-tiny", {}, 4096),
        ("moe-llm-tiny", {}, 4096),
    ],
    "cuda": [
        ("moe-gpt2", {"hidden_size": 384, "num_heads": 6}, 32768),
        ("moe-gpt2", {}, 32768),
        ("moe-gpt2", {"hidden_size": 1536, "num_heads": 24}, 32768),
        ("moe-bert-large", {}, 16384),
        ("moe-transformer-xl", {}, 8000),
        ("moe-llm", {}, 32768),
    ],
}
DTYPES = {"cpu": torch.float32, "cuda": torch.bfloat16}
FITS = ("one_rate", "two_rates", "carried")
COLOURS = {"one_rate": ORANGE, "two_rates": BLUE, "carried": GREY}
LABELS = {
    "one_rate": "paper's formula, P of the layout",
    "two_rates": "scores at their own rate",
    "carried": "paper's formula, P of the other layout",
}


def measure(config: ModelConfig, device: torch.device, max_tokens: int, budget: float) -> list[dict[str, Any]]:
    """Both layouts of one module: their fits, and every sample with what each fit predicts."""
    profiles = {
        padded: profile_attention(
            config, device, DTYPES[device.type], max_tokens=max_tokens, padded=padded, budget_seconds=budget
        )
        for padded in (False, True)
    }
    one_rate = {
        padded: AttentionProfile(p.hidden_size, fit_samples(p.hidden_size, p.fitted, (SCORE_COST_ONE,)), (), ())
        for padded, p in profiles.items()
    }
    rows = []
    for padded, profile in profiles.items():
        predictors = {"one_rate": one_rate[padded], "two_rates": profile, "carried": one_rate[not padded]}
        samples = [
            {
                "num_sequences": len(s.lengths),
                "longest": max(s.lengths),
                "tokens": sum(s.lengths),
                "fitted": s in profile.fitted,
                "seconds": s.seconds,
                "predicted_seconds": {name: p.predict(s) for name, p in predictors.items()},
            }
            for s in (*profile.fitted, *profile.checked)
            if s.padded == padded
        ]
        rows.append(
            {
                "model": config.name,
                "hidden_size": config.hidden_size,
                "position": config.position,
                "causal": config.causal,
                "layout": "padded" if padded else "packed",
                "fits": {name: describe(p) for name, p in predictors.items()},
                "errors": {name: summary(errors_of(samples, name)) for name in FITS},
                "samples": samples,
            }
        )
    return rows


def describe(profile: AttentionProfile) -> dict[str, float]:
    fit = profile.fit
    return {
        "flops_per_second": fit.flops_per_second,
        "overhead_seconds": fit.overhead_seconds,
        "score_cost": fit.score_cost / SCORE_COST_ONE,
    }


def errors_of(samples: list[dict[str, Any]], name: str) -> list[float]:
    """Relative errors of the samples that were not fitted."""
    return [abs(s["predicted_seconds"][name] / s["seconds"] - 1) for s in samples if not s["fitted"]]


def summary(errors: list[float]) -> dict[str, float | int]:
    if not errors:
        return {"num_samples": 0}
    return {"median": float(np.median(errors)), "max": max(errors), "num_samples": len(errors)}


def build_figure(rows: list[dict[str, Any]], device_name: str) -> Figure:
    figure = Figure(figsize=(9, 4), layout="constrained")
    left, right = figure.subplots(1, 2)
    held_out = {
        layout: [s for r in rows if r["layout"] == layout for s in r["samples"]] for layout in ("padded", "packed")
    }
    for layout, marker, colour in (("padded", "s", GREEN), ("packed", "o", BLUE)):
        points = [s for s in held_out[layout] if not s["fitted"]]
        left.plot(
            [s["seconds"] * 1e3 for s in points],
            [s["predicted_seconds"]["two_rates"] * 1e3 for s in points],
            marker, ms=4.5, mfc="none", color=colour, label=f"{layout}, {len(points)} batches",
        )  # fmt: skip
    times = [s["seconds"] * 1e3 for samples in held_out.values() for s in samples if not s["fitted"]]
    ends = np.array([min(times) / 1.3, max(times) * 1.3])
    left.plot(ends, ends, color=MUTED, lw=0.8)
    left.fill_between(ends, ends * 0.95, ends * 1.05, color=MUTED, alpha=0.2, lw=0, label="within 5%")
    left.set(xscale="log", yscale="log", xlabel="measured, ms", ylabel="predicted, ms")
    left.legend(loc="upper left")
    titles(left, "Batches that no fit has seen", f"attention, forward and backward; {device_name}")

    largest = [0.2]
    for name in FITS:
        errors = np.sort(errors_of([s for samples in held_out.values() for s in samples], name))
        largest.append(float(errors[-1]))
        label = f"{LABELS[name]}: median {100 * np.median(errors):.0f}%"
        right.step(
            100 * errors, (1 + np.arange(len(errors))) / len(errors), where="post", color=COLOURS[name], label=label
        )
    right.axvline(5, color=RED, lw=0.8, ls="--", label="the paper's 5%")
    right.set(
        xlim=(0, min(100, 105 * max(largest))),
        ylim=(0, 1),
        xlabel="error of the predicted time, %",
        ylabel="share of batches",
    )
    right.legend(loc="lower right", fontsize=8)
    titles(right, "Error of the prediction", "measured here; the 5% are the paper's, on its V100")
    return figure


@click.command()
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu")
@click.option("--budget", default=6.0, help="Seconds for each module and layout.")
@click.option("--threads", default=1, help="CPU threads.")
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--figure", default=None, type=click.Path(path_type=Path))
def main(device: str, budget: float, threads: int, out: Path, figure: Path | None) -> None:
    """Measure all modules, write JSON, draw the figure."""
    torch.set_num_threads(threads)
    rows, load = [], os.getloadavg()[0]
    for preset, changes, max_tokens in CASES[device]:
        rows += measure(model_preset(preset).override(**changes), torch.device(device), max_tokens, budget)
        for row in rows[-2:]:
            fit, errors = row["fits"]["two_rates"], row["errors"]
            click.echo(
                f"{row['model']:<24} d={row['hidden_size']:<5} {row['layout']}  P {fit['flops_per_second']:.2e}/s  "
                f"scores x{fit['score_cost']:<5g} overhead {fit['overhead_seconds'] * 1e3:7.3f} ms  error, median/max: "
                + "  ".join(f"{n} {e['median']:.1%}/{e['max']:.1%}" for n, e in errors.items() if e["num_samples"])
            )
    overall = {
        layout: {
            name: summary([e for r in rows if r["layout"] == layout for e in errors_of(r["samples"], name)])
            for name in FITS
        }
        for layout in ("padded", "packed")
    }
    environment = describe_machine(device) | {"load_average_before": load}
    result = {
        "question": "relative error of the attention cost model on batches that were not fitted",
        "environment": environment | ({"threads": threads} if device == "cpu" else {}),
        "dtype": str(DTYPES[device]).removeprefix("torch."),
        "errors": overall,
        "rows": rows,
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=1))
    for layout, errors in overall.items():
        click.echo(f"all {layout}: " + "  ".join(f"{n} {e['median']:.1%}/{e['max']:.1%}" for n, e in errors.items()))
    if figure is not None:
        png, _ = draw(lambda: build_figure(rows, environment["device_name"]))
        save_png(figure, png)


if __name__ == "__main__":
    main()
