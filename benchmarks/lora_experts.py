"""LoRA on experts beside LoRA on attention, with as many trained parameters: which learns more?

    python -m benchmarks.lora_experts --data TRAIN.jsonl.gz --held-out VALID.jsonl.gz --work runs/lora-experts

1. A Mixtral (3 layers x 64, 8 experts, top-2), trained from random weights on the records of --data whose domain is
   not --domain: every weight.
2. Adapters on what that left, trained on the records of --domain, their scale twice their rank: on attention, and on
   experts, each with every rate of LEARNING_RATES, and with more seeds at the rate that ended lowest. Held out are the
   records of --domain in --held-out, other documents.

One rank on one core: the function computed does not depend on the ranks. What `luffy finetune` runs, in one process.
Numbers: docs/results/lora-experts.json, and their figure.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from statistics import fmean
from typing import Any

import click
from matplotlib.figure import Figure

from benchmarks.finetune import curve, in_transformers, make_model
from luffy.report import style
from luffy.train.metrics import describe_machine, write_json_atomic

SIZES = {"vocab_size": 1024, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3}
LENGTH, BATCH, EVAL_BATCHES = 64, 8, 16
LEARNING_RATES, MORE_SEEDS = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1), (1, 2)
# A rank on attention trains 1,344 parameters of this model, one on experts 12,288.
RANKS = {"attention": 19, "experts": 2}
COLOURS = {"attention": style.BLUE, "experts": style.ORANGE}


def records(path: Path, domain: str, inside: bool, most_characters: int) -> list[str]:
    """Lines of the records of `domain`, or of all others, until there are characters enough."""
    out, total = [], 0
    with gzip.open(path, "rt", encoding="utf-8") as f:
        for line in f:
            record = json.loads(line)
            if (record["domain"] == domain) != inside or record["domain"].startswith("handbook"):
                continue
            out.append(json.dumps({"text": record["text"]}))
            total += len(record["text"])
            if total > most_characters:
                break
    return out


def finetune(out: Path, model: Path, data: Path, steps: int, lr: float, **more: Any) -> dict[str, Any]:
    """A run of `luffy finetune`, unless there is one already; its curve."""
    import torch

    from luffy.comm import build_mesh
    from luffy.hf.finetune import FineTuner
    from luffy.hf.options import FinetuneOptions

    if not (out / "summary.json").exists():
        out.mkdir(parents=True)
        options = FinetuneOptions(
            model=str(model), data=str(data), out=str(out), ranks=1, steps=steps, batch_size=BATCH, lr=lr,
            eval_every=20, sequence_length=LENGTH, eval_batches=EVAL_BATCHES, checkpoint_every=0, device="cpu",
            tensorboard=False, verify_export=False, **more,
        )  # fmt: skip
        FineTuner(options, build_mesh(torch.device("cpu"))).run()
        (out / "summary.json").touch()
    return curve(out)


def all_runs(_: int, work: Path, base_steps: int, steps: int) -> dict[str, Any]:
    """The model and its adapters, in one process."""
    base = finetune(work / "base", work / "model", work / "others.jsonl", base_steps, 5e-3)

    def adapted(place: str, lr: float, seed: int) -> dict[str, Any]:
        rank, out = RANKS[place], work / f"{place}-{lr}-{seed}"
        return finetune(
            out, work / "base" / "model", work / "domain.jsonl", steps, lr, validation=str(work / "valid.jsonl"),
            lora=rank, lora_alpha=2 * rank, lora_on=place, seed=seed, export=False,
        )  # fmt: skip

    runs: dict[str, Any] = {}
    for place in RANKS:
        tried = {lr: adapted(place, lr, 0) for lr in LEARNING_RATES}
        ends = {lr: run["held_out"][-1][1] for lr, run in tried.items()}
        best = min(ends, key=lambda lr: ends[lr])
        found = [tried[best], *(adapted(place, best, seed) for seed in MORE_SEEDS)]
        runs[place] = {
            "rank": RANKS[place], "end_by_lr": {str(lr): end for lr, end in ends.items()}, "lr": best,
            "ends": [run["held_out"][-1][1] for run in found], "curves": [run["held_out"] for run in found],
        }  # fmt: skip
    before = in_transformers(work / "base" / "model", work / f"experts-{LEARNING_RATES[0]}-0" / "tokens",
                             EVAL_BATCHES * BATCH)  # fmt: skip
    return {
        "base": {k: base[k] for k in ("steps", "tokens", "held_out")}, "before": before,
        "trained_parameters": trained_parameters(work / "base" / "model"), "runs": runs,
    }  # fmt: skip


def trained_parameters(model: Path) -> dict[str, int]:
    """Counted in the model itself."""
    from luffy.hf import load

    counts = {}
    for place, rank in RANKS.items():
        parallel = load(model)
        parallel.adapt(rank, on=(place,))
        counts[place] = sum(p.numel() for p in parallel.parameters() if p.requires_grad)
    return counts


def draw(results: dict[str, Any]) -> Any:
    figure = Figure(figsize=(4.8, 3.4), layout="constrained")
    axes = figure.subplots()
    for place, run in results["runs"].items():
        for i, points in enumerate(run["curves"]):
            end, trained = fmean(run["ends"]), results["trained_parameters"][place]
            label = f"{place}: {end:.3f} at the end ({trained:,} trained)" if i == 0 else None
            points = [[0, results["before"]], *points]
            axes.plot(*zip(*points, strict=True), color=COLOURS[place], marker="o", markersize=3, label=label)
    style.titles(axes, "LoRA on attention, and on experts", f"{len(run['curves'])} seeds each, the best rate of each")
    axes.set(xlabel="optimizer step", ylabel="held out (nats per token)")
    axes.legend()
    return figure


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="Texts with domains.")
@click.option("--held-out", required=True, type=click.Path(path_type=Path, exists=True), help="Other such texts.")
@click.option("--domain", default="dictionary", show_default=True, help="What adapters are trained on.")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for models and runs.")
@click.option("--base-steps", default=600, show_default=True)
@click.option("--steps", default=200, show_default=True, help="Of each run with adapters.")
@click.option("--out", default="docs/results/lora-experts.json", show_default=True, type=click.Path(path_type=Path))
@click.option("--figure", default="docs/figures/lora-experts.png", show_default=True, type=click.Path(path_type=Path))
def main(
    data: Path, held_out: Path, domain: str, work: Path, base_steps: int, steps: int, out: Path, figure: Path
) -> None:
    """All runs, their figure and their numbers."""
    from luffy.testing import run_ranks

    work.mkdir(parents=True, exist_ok=True)
    tokens = LENGTH * BATCH
    given = {"others": records(data, domain, False, 4 * base_steps * tokens),
             "domain": records(data, domain, True, 4 * steps * tokens),
             "valid": records(held_out, domain, True, 10**9)}  # fmt: skip
    for name, lines in given.items():
        (work / f"{name}.jsonl").write_text("\n".join(lines), encoding="utf-8")
    if not (work / "model" / "config.json").exists():
        make_model(work / "model", [json.loads(line)["text"] for line in given["others"] + given["domain"]], **SIZES)
    results: dict[str, Any] = {
        "provenance": "measured", "environment": describe_machine("cpu"), "domain": domain, "steps": steps,
        **run_ranks(all_runs, 1, work, base_steps, steps, timeout_seconds=3600)[0],
    }  # fmt: skip
    write_json_atomic(out, results)
    figure.parent.mkdir(parents=True, exist_ok=True)
    style.save_png(figure, style.draw(lambda: draw(results))[0])
    click.echo(json.dumps({place: [run["end_by_lr"], run["ends"]] for place, run in results["runs"].items()}))


if __name__ == "__main__":
    main()
