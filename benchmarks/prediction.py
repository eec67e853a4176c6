"""How far off is the cost model? Predicted against measured step times, behind links of several rates.

    python benchmarks/prediction.py run --out runs/prediction            (needs root: it makes networks)
    python benchmarks/prediction.py table --out runs/prediction --json docs/results/prediction.json \
        --figure docs/figures/prediction.png

Each cell (ranks, rate, batch) is one lab. Its ranks measure links and experts as `--recipe auto` does, record the
routing of two steps that run as vanilla_dedup, and predict the other modes from that: the model's difference, added to
what vanilla_dedup took. Then all modes run, in turn, round after round. `run` resumes: cells that are there stay.
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import click
from luffy.train.auto import MARGIN

from luffy.report.style import draw as draw_figure
from luffy.report.style import new_figure, save_png, titles
from luffy.train.metrics import describe_machine, write_json_atomic

ROUNDS, STEPS = 4, 2  # measured steps a mode: ROUNDS x STEPS, after one that settles
HALF = ROUNDS * STEPS // 2


@click.group()
def main() -> None:
    """Measure, or tabulate what was measured."""


@main.command()
@click.option("--ranks", default="2,4", show_default=True)
@click.option("--links", default="100mbit,250mbit,1gbit", show_default=True)
@click.option("--batches", default="4,12", show_default=True, help="Sequences per rank and step.")
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
def run(ranks: str, links: str, batches: str, device: str, out: Path) -> None:
    """Measure every cell."""
    out.mkdir(parents=True, exist_ok=True)
    for n in ranks.split(","):
        for link in links.split(","):
            for batch in batches.split(","):
                target = out / f"{n}-{link}-{batch}.json"
                if target.exists():
                    continue
                command = [sys.executable, "-m", "luffy.train.cli", "lab", "--ranks", n, "--link", link, "--"]
                command += [sys.executable, __file__, "worker", "--ranks", n, "--link", link, "--batch", batch]
                done = subprocess.run([*command, "--device", device, "--out", str(target)], text=True)
                click.echo(f"{target.name}: {'measured' if done.returncode == 0 else 'failed'}")


class _Keep:
    """In place of an AutoControl: records every step, and keeps what was recorded."""

    def __init__(self, mode: Any) -> None:
        self.mode, self.traced = mode, []

    def before(self, step: int) -> None:
        pass

    def decides_after(self, step: int) -> bool:
        return True

    def after(self, step: int, record: dict, traced: list, plain: bool) -> None:
        self.traced += traced


@main.command()
@click.option("--ranks", type=int, required=True)
@click.option("--link", required=True)
@click.option("--batch", type=int, required=True)
@click.option("--device", default="cpu")
@click.option("--out", required=True, type=click.Path(path_type=Path))
def worker(ranks: int, link: str, batch: int, device: str, out: Path) -> None:
    """One rank of one cell."""
    from luffy.plan.choose import LayerRates, Mode, weigh

    from luffy.train.launch import join_world
    from luffy.train.options import TrainOptions
    from luffy.train.rehoming import current_owners, wire_of
    from luffy.train.trainer import Trainer

    options = TrainOptions(
        recipe="auto", ranks=ranks, device=device, batch_size=batch * ranks, sequence_length=128, steps=1000,
        out=str(out.parent / "run"), checkpoint_every=0, eval_every=0, tensorboard=False, profile_attention=False,
    )  # fmt: skip
    trainer = Trainer(options, join_world(device, "gloo", None, None, 600.0))
    trainer.prepare()
    auto = trainer.auto
    assert auto is not None
    trainer.auto = None
    for _ in range(3):
        trainer.train_step()
    keep = _Keep(auto.mode)
    trainer.auto = keep  # type: ignore[assignment]
    attention = [trainer.train_step()["seconds_split"]["attention"] for _ in range(2)]
    trainer.auto = None
    wire = replace(wire_of(trainer.model, padded=False), topology=auto.topology)
    rates = LayerRates(auto.pair_seconds, median(attention) / trainer.config.num_layers)
    table = weigh(keep.traced, current_owners(trainer.model), wire, rates)
    L = len(trainer.model.moe_layers)
    modes = [Mode(m, (r,) * L) for m, r in ((False, "static"), (False, "fetch"), (False, "shadow"), (True, "static"))]
    modes += [m for m in table if len(set(m.residency)) > 1]
    seconds: dict[Mode, list[float]] = {m: [] for m in modes}
    for _ in range(ROUNDS):
        for mode in modes:
            auto.set(mode)
            trainer.train_step()
            seconds[mode] += [trainer.train_step()["seconds"] for _ in range(STEPS)]
    offset = median(seconds[modes[0]]) - table[modes[0]] / len(keep.traced)
    if trainer.mesh.rank:
        return
    cell = {
        "ranks": ranks, "link": link, "batch": batch, "environment": describe_machine(device),
        "links_bytes_per_second": auto.topology.intra_node_bytes_per_second, "attention_seconds": median(attention),
        "modes": {
            m.name: {"predicted": table[m] / len(keep.traced) + offset, "measured": median(s), "all": s}
            for m, s in seconds.items()
        },
    }  # fmt: skip
    write_json_atomic(out, cell)


def settle(modes: dict[str, dict[str, Any]]) -> str:
    """The mode that auto's rule stays with, its duels decided by the first half of the measured steps.

    What promises the most meets the mode at hand in a duel, the faster stays, and from then on the other is taken to
    be as fast as it was. It ends when nothing promises a MARGIN.
    """
    fought = {name: median(m["all"][:HALF]) for name, m in modes.items()}
    holder, expected = "vanilla_dedup", {name: m["predicted"] for name, m in modes.items()}
    expected[holder] = fought[holder]
    while (best := min(expected, key=lambda name: expected[name])) != holder:
        if expected[best] > expected[holder] * (1 - MARGIN):
            break
        expected[best] = fought[best]
        if fought[best] < fought[holder]:
            holder = best
    return holder


@main.command()
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--json", "target", type=click.Path(path_type=Path))
@click.option("--figure", type=click.Path(path_type=Path))
def table(out: Path, target: Path | None, figure: Path | None) -> None:
    """Errors of the predictions, and what choosing by them costs."""
    cells = [json.loads(p.read_text()) for p in sorted(out.glob("*.json"))]
    errors, behind, tried = [], [], []
    click.echo("| ranks | link | batch | mode | predicted s | measured s | error |")
    click.echo("| --- | --- | --- | --- | --- | --- | --- |")
    for c in cells:
        best = min(m["measured"] for m in c["modes"].values())
        chosen, anchor = min(c["modes"].values(), key=lambda m: m["predicted"]), c["modes"]["vanilla_dedup"]
        if chosen["predicted"] > anchor["measured"] * (1 - MARGIN):  # as `auto` chooses: not for so little
            chosen = anchor
        behind.append(chosen["measured"] / best - 1)
        tried.append(c["modes"][settle(c["modes"])]["measured"] / best - 1)
        for name, m in c["modes"].items():
            error = m["predicted"] / m["measured"] - 1
            if name != "vanilla_dedup":  # the anchor
                errors.append(abs(error))
            click.echo(
                f"| {c['ranks']} | {c['link']} | {c['batch']} | {name}{' (chosen)' if m is chosen else ''} | "
                f"{m['predicted']:.3f} | {m['measured']:.3f} | {error:+.1%} |"
            )
    click.echo(f"{len(errors)} predictions: median error {median(errors):.1%}, worst {max(errors):.1%}")
    click.echo(f"chosen by them, behind the best: {median(behind):.1%} in the median, {max(behind):.1%} at worst")
    click.echo(f"where auto's duels come to rest: {median(tried):.1%} in the median, {max(tried):.1%} at worst")
    if target is not None:
        results = {"cells": cells, "errors": errors, "behind_best": behind, "behind_best_after_duels": tried}
        write_json_atomic(target, results)
    if figure is not None:
        png, _ = draw_figure(lambda: _picture(cells))
        save_png(figure, png)


def _picture(cells: list[dict]) -> Any:
    picture, axes = new_figure(height=4.2)
    names = sorted({("mixture" if "(" in n else n) for c in cells for n in c["modes"] if n != "vanilla_dedup"})
    for i, name in enumerate(names):
        points = [m for c in cells for n, m in c["modes"].items() if ("mixture" if "(" in n else n) == name]
        axes.scatter([p["measured"] for p in points], [p["predicted"] for p in points], label=name, color=f"C{i}", s=22)
    low, high = axes.get_xlim()[0], axes.get_xlim()[1]
    axes.plot([low, high], [low, high], color="0.6", linewidth=0.8, zorder=0)
    axes.set(xlabel="measured seconds a step", ylabel="predicted", xscale="log", yscale="log")
    titles(axes, "Step time, predicted and measured", "emulated links, 2 CPU cores")
    ticks = [t for t in (0.1, 0.2, 0.5, 1, 2, 5, 10) if low / 2 < t < high * 2]
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_ticks([], minor=True)
    axes.legend(frameon=False, fontsize=8)
    return picture


if __name__ == "__main__":
    main()
