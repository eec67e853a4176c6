"""What benchmarks over `luffy compare` share: options, a budget of time, cells that are kept, JSON, table, figure.

A benchmark is a list of cells (one `luffy compare` each) and a way to read them. Cells lie in OUT/cells and are
named by what they run, so questions that need the same runs share them. When the budget is spent the cell at work is
stopped where it is; the next call continues from its last checkpoint. With --link every cell runs in an emulated
cluster (`luffy lab`, which needs root), its links are measured first, and everything that comes out says `emulated`.
"""

from __future__ import annotations

import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import click
from matplotlib.figure import Figure

from luffy.report import style
from luffy.report.compare_figures import legend, look, short
from luffy.report.compare_table import Table, as_text
from luffy.signals import handled
from luffy.train.metrics import describe_machine, write_json_atomic

LUFFY = [sys.executable, "-m", "luffy.train.cli"]
# NCCL past NVLink and shared memory: every byte through the loopback interface, as a slow link.
SOCKETS = {"NCCL_P2P_DISABLE": "1", "NCCL_SHM_DISABLE": "1", "NCCL_NET": "Socket", "NCCL_SOCKET_IFNAME": "lo"}
STOPPING_SECONDS = 15.0  # left for a cell to end its ranks and its links
MODELS = ("moe-gpt2", "moe-bert-large", "moe-transformer-xl")


@dataclass(frozen=True)
class Settings:
    """What the command line of a benchmark says. `links` is (None,) outside the lab."""

    device: str
    ranks: int
    links: tuple[str | None, ...]
    steps: int
    out: Path
    deadline: float
    small: bool
    more: tuple[str, ...]  # options of `luffy train` for all runs, given behind --

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def until(self, deadline: float) -> Settings:
        """The same, to be over by `deadline`."""
        return replace(self, deadline=deadline)

    def model(self, name: str) -> list[str]:
        """A model of the paper: cut to 4 blocks on a GPU, to its tiny shape on a CPU (2 blocks if small)."""
        if self.on_gpu:
            return ["--model", name, "--layers", "4", "--vocab-size", "8192"]
        cut = ["--layers", "2", "--sequence-length", "64"] if self.small else ["--sequence-length", "128"]
        return ["--model", f"{name}-tiny", "--vocab-size", "2048", *cut]


@dataclass(frozen=True)
class Cell:
    """One comparison. `key` is its place on the benchmark's axis: a model, a rate, a number of experts."""

    key: str
    recipes: str
    options: list[str]
    ranks: int | None = None  # default: of the settings, as for the link
    link: str | None = None
    steps: int | None = None
    repeats: int = 1
    extra: list[str] = field(default_factory=list)  # options of `luffy compare`


def command_of(cell: Cell, s: Settings) -> list[str]:
    """The cell's command line, without --out."""
    ranks, link, steps = cell.ranks or s.ranks, cell.link or s.links[0], cell.steps or s.steps
    inside = [*LUFFY, "compare", "--recipes", cell.recipes, "--repeats", str(cell.repeats), *cell.extra]
    inside += ["--device", s.device, "--ranks", str(ranks), "--steps", str(steps)]
    inside += ["--batch-size", str(4 * ranks), "--eval-every", str(max(1, steps // 10)), "--eval-batches", "4"]
    inside += ["--checkpoint-every", str(max(10, steps // 4)), "--keep-checkpoints", "1", "--no-tensorboard"]
    inside += ["--resume", "--discard-checkpoints", *cell.options, *s.more]
    if link is None:
        return inside
    return [*LUFFY, "lab", "--ranks", str(ranks), "--link", link, "--", *inside]


def folder_of(cell: Cell, s: Settings) -> Path:
    """Where the cell's runs lie: a name of what they run."""
    digest = hashlib.sha256(json.dumps(command_of(cell, s)[1:]).encode()).hexdigest()[:10]
    return s.out / "cells" / f"{re.sub(r'[^a-z0-9.-]+', '_', cell.key.lower())}-{digest}"


def run_cell(cell: Cell, s: Settings) -> list[dict[str, Any]] | None:
    """The summaries of a cell, from an earlier call where it is finished; None when the time was over before."""
    command, folder = command_of(cell, s), folder_of(cell, s)
    done = folder / "done.json"
    if not done.exists():
        seconds = s.deadline - STOPPING_SECONDS - time.monotonic()
        if seconds <= 0:
            return None
        click.echo(f"== {cell.key}", err=True)
        status = run_for([*command, "--out", str(folder)], seconds)
        if status is None:
            return None
        if status:
            sys.exit(status)  # the cause has been said
        write_json_atomic(done, {"key": cell.key, "command": ["luffy", *command[len(LUFFY) :]]})
    return json.loads((folder / "compare.json").read_text("utf-8"))


def run_for(command: list[str], seconds: float) -> int | None:
    """The exit status of a command, or None if it had to be stopped after `seconds`. It never outlives this process."""
    with handled([signal.SIGTERM], signal.default_int_handler), subprocess.Popen(command) as process:
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGTERM)
            process.wait()
            return None
        except BaseException:
            process.send_signal(signal.SIGTERM)
            raise


Cells = dict[str, list[dict[str, Any]]]


@dataclass(frozen=True)
class Study:
    """One question: its cells, and how to read them as a table and as a figure."""

    name: str
    question: str
    cells: Callable[[Settings], Sequence[Cell]]
    table: Callable[[Cells], Table]
    figure: Callable[[Cells], Figure]
    steps: int = 40
    # Where the question is about links: their rates on a CPU and on a GPU.
    cpu_links: tuple[str, ...] = ()
    gpu_links: tuple[str, ...] = ()


def options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The command line that all benchmarks have."""
    for decorate in reversed(
        (
            click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True),
            click.option("--ranks", default=4, show_default=True),
            click.option("--link", help="Rate of a rank's link, such as 250mbit (several by commas for a sweep)."),
            click.option("--steps", type=int, help="Steps of a run (default: the benchmark's)."),
            click.option("--out", default="runs/bench", show_default=True, type=click.Path(path_type=Path)),
            click.option("--budget-seconds", default=3600.0, show_default=True, help="Then stop; call again to go on."),
            click.option("--small", is_flag=True, help="A reduced set, for two cores."),
            click.argument("more", nargs=-1, type=click.UNPROCESSED),
        )
    ):
        command = decorate(command)
    return command


def run_study(study: Study, s: Settings) -> bool:
    """Run what is missing, write OUT/NAME.json and OUT/NAME.png, print the table; whether all cells are finished."""
    planned = list(study.cells(s))
    cells: Cells = {}
    for cell in planned:
        found = run_cell(cell, s)
        if found is None:
            break
        cells[cell.key] = found
    complete = len(cells) == len(planned)
    if cells:
        report(study, s, cells, complete)
    if not complete:
        click.echo(f"{study.name}: {len(cells)} of {len(planned)} cells are finished; call again to continue", err=True)
    return complete


def report(study: Study, s: Settings, cells: Cells, complete: bool, **more: Any) -> None:
    """more: other entries of the JSON, which may stand in for those that it has by itself."""
    table = study.table(cells)
    networks = {key: summaries[0].get("network") for key, summaries in cells.items()}
    emulated = {key: network for key, network in networks.items() if network}
    write_json_atomic(
        s.out / f"{study.name}.json",
        {
            "question": study.question,
            "hardware": describe_machine(s.device),
            "provenance": "emulated" if emulated else "measured",
            "network": emulated or "not shaped",
            "ranks": s.ranks,
            "complete": complete,
            "table": {"head": table[0], "rows": table[1]},
            "cells": cells,
        }
        | more,
    )
    with style.settings():
        figure = study.figure(cells)
        figure.text(
            0.995, 0.004, "emulated links" if emulated else "measured", ha="right", fontsize=7, color=style.MUTED
        )
        figure.savefig(s.out / f"{study.name}.png", dpi=220)
    click.echo(f"\n{study.question}\n{as_text(table)}\n{s.out / study.name}.json, .png")


def main(study: Study) -> None:
    """The command line of one benchmark."""

    @click.command(help=study.question)
    @options
    def command(**values: Any) -> None:
        run_study(study, settings_of(study, **values))

    command()


def settings_of(study: Study, *, link: str | None, steps: int | None, budget_seconds: float, **values: Any) -> Settings:
    usual = study.gpu_links if values["device"] == "cuda" else study.cpu_links
    links: tuple[str | None, ...] = tuple(link.split(",")) if link else usual or (None,)
    deadline = time.monotonic() + budget_seconds
    return Settings(**values, links=links, steps=steps or study.steps, deadline=deadline)


# ---------------------------------------------------------------- reading cells


def communication(summary: dict[str, Any]) -> float:
    """Seconds of a mean step in which a rank waited for others' rows, or for the sums of gradients."""
    return summary["phase_seconds"]["exchange"] + summary["phase_seconds"].get("gradients", 0.0)


def step_seconds(summary: dict[str, Any]) -> float:
    """Median."""
    return summary["step_seconds"][1]


def computation(summary: dict[str, Any]) -> float:
    return sum(summary["phase_seconds"].values()) - communication(summary)


def by_recipe(cells: Cells, axis: str, value: Callable[[dict[str, Any]], float | None], form: str = "{:.3f}") -> Table:
    """One row a cell, one column a recipe."""
    labels = list(dict.fromkeys(s["label"] for summaries in cells.values() for s in summaries))
    rows = []
    for key, summaries in cells.items():
        found = {s["label"]: value(s) for s in summaries}
        rows.append([key, *("–" if found.get(label) is None else form.format(found[label]) for label in labels)])
    return [axis, *labels], rows


MOST_BARS = 6
ALWAYS_DRAWN = ("vanilla", "vanilla_dedup", "luffy", "luffy_max")


def bars(
    cells: Cells, value: Callable[[dict[str, Any]], float | None], title: str, x_label: str, form: str = "%.3g"
) -> Figure:
    """A panel a cell: horizontal bars, the greatest first, each with its number; six at most, the table has all.

    Those of ALWAYS_DRAWN are drawn, and the greatest of the others.
    """
    figure = Figure(figsize=(style.WIDTH + 0.8, 0.9 + len(cells) * (0.35 + 0.3 * MOST_BARS)), layout="constrained")
    panels = figure.subplots(len(cells), 1, sharex=True, squeeze=False)[:, 0]
    for axes, (name, summaries) in zip(panels, cells.items(), strict=True):
        found = sorted(((v, s["label"]) for s in summaries if (v := value(s)) is not None), reverse=True)
        rest = [f for f in found if f[1] not in ALWAYS_DRAWN]
        kept = {f for f in found if f[1] in ALWAYS_DRAWN}
        kept |= set(rest[: MOST_BARS - len(kept)])
        shown = [f for f in found if f in kept]
        colours = [style.BLUE if label.startswith("luffy") else style.GREY for _, label in shown]
        drawn = axes.barh([label for _, label in shown], [v for v, _ in shown], 0.68, color=colours)
        axes.bar_label(drawn, fmt=form, fontsize=8.5, padding=3)
        axes.invert_yaxis()
        axes.tick_params(axis="y", length=0)
        axes.margins(x=0.12)
        cell = name.replace("moe-", "")
        if axes is panels[0]:
            style.titles(axes, title, cell)
        else:
            axes.set_title(cell, fontsize=9, fontweight="normal", color=style.MUTED)
    panels[-1].set_xlabel(x_label)
    return figure


def lines(
    cells: Cells, value: Callable[[dict[str, Any]], float | None], title: str, x_label: str, y_label: str
) -> Figure:
    """One line a recipe over the cells, in their order; bars are the quartiles of step time where that is drawn."""
    labels = list(dict.fromkeys(s["label"] for summaries in cells.values() for s in summaries))
    figure, axes = style.new_figure(height=3.0 + 0.14 * len(labels))
    for i, label in enumerate(labels):
        points = [
            (x, found, s)
            for x, summaries in enumerate(cells.values())
            for s in summaries
            if s["label"] == label and (found := value(s)) is not None
        ]
        x, y = [p[0] for p in points], [p[1] for p in points]
        axes.plot(x, y, marker="o", markersize=4, linewidth=1.7, label=short(label), **look(i))
        if value is step_seconds:
            axes.vlines(x, [p[2]["step_seconds"][0] for p in points], [p[2]["step_seconds"][2] for p in points],
                        color=look(i)["color"], linewidth=1, alpha=0.6)  # fmt: skip
    axes.set_xticks(range(len(cells)), list(cells))
    axes.set_ylim(bottom=0)
    axes.set(xlabel=x_label, ylabel=y_label)
    axes.grid(axis="y")
    style.titles(axes, title)
    legend(axes, [short(label) for label in labels])
    return figure
