"""The figure on the first page: speed and bytes of a few recipes behind slow links, from finished runs.

    python benchmarks/gains.py collect --runs FOLDER_OF_RUNS --json docs/results/gains.json
    python benchmarks/gains.py figure docs/results/gains.json --png docs/figures/gains.png

FOLDER_OF_RUNS holds a run of each recipe, as `benchmarks/regimes.py` and `luffy compare` write them. Only the last
steps are taken: by then seats are predicted.
"""

from pathlib import Path

import click
from matplotlib.figure import Figure

from luffy.report.runs import read_json, read_run, write_json_atomic
from luffy.report.style import BLUE, GREY, draw, new_figure, save_png, titles

RECIPES = ("vanilla", "vanilla_dedup", "luffy", "luffy_max")


@click.group()
def cli() -> None:
    """Collect numbers, or draw them."""


@cli.command()
@click.option("--runs", "folder", required=True, type=click.Path(path_type=Path))
@click.option("--last", default=10, show_default=True, help="Steps to take, from the end.")
@click.option("--json", "target", required=True, type=click.Path(path_type=Path))
def collect(folder: Path, last: int, target: Path) -> None:
    """Tokens a second and bytes a token of each recipe."""
    found = []
    for name in RECIPES:
        run = read_run(folder / name)
        records = run.records[-last:]
        tokens = sum(r["tokens"] for r in records)
        found.append(
            {
                "recipe": name,
                "tokens_per_second": tokens / sum(r["seconds"] for r in records),
                "bytes_per_token": sum(sum(r["bytes"].values()) for r in records) / tokens,
            }
        )
    about = {key: run.lookup(key) for key in ("provenance", "device_name", "world_size", "network", "torch_version")}
    write_json_atomic(target, {**about, "model": run.lookup("model"), "last_steps": last, "recipes": found})


def build(found: dict) -> Figure:
    """One bar a recipe, by speed; bytes beside."""
    rows = sorted(found["recipes"], key=lambda r: r["tokens_per_second"])
    figure, axes = new_figure(height=2.3, width=5.6)
    names = [r["recipe"] for r in rows]
    values = [r["tokens_per_second"] / 1e3 for r in rows]
    axes.barh(names, values, color=[BLUE if n.startswith("luffy") else GREY for n in names], height=0.62)
    for y, (value, row) in enumerate(zip(values, rows, strict=True)):
        text = f"{value:.0f}k tokens/s, {row['bytes_per_token'] / 1e3:.0f} kB sent a token"
        inside = value > 0.6 * max(values)
        axes.annotate(text, (value, y), (-5 if inside else 5, 0), textcoords="offset points", va="center",
                      ha="right" if inside else "left", color="white" if inside else "black", fontsize=8.5)  # fmt: skip
    axes.set_xticks([])
    axes.spines["bottom"].set_visible(False)
    axes.tick_params(axis="y", length=0)
    titles(axes, "Eight ranks, 8 Gb/s each", "emulated links, one H100, MoE-GPT2 12 x 768, 16 experts top-2")
    return figure


@cli.command()
@click.argument("numbers", type=click.Path(path_type=Path))
@click.option("--png", required=True, type=click.Path(path_type=Path))
def figure(numbers: Path, png: Path) -> None:
    """Draw what `collect` wrote."""
    save_png(png, draw(lambda: build(read_json(numbers)))[0])


if __name__ == "__main__":
    cli()
