"""`luffy compare`: several recipes on the same data and seed, one table, one page.

Each recipe is an ordinary run in a folder of its own, so everything that `luffy train` writes is there to look at.
Repeats are interleaved (A B C A B C): a machine that slows down in the course of an hour slows all recipes alike, and
does not make the last one look bad. What the numbers mean is said in luffy.report.summaries.

It resumes. A run whose summary is there is finished and is not run again; one that was stopped goes on from its
checkpoint. Both only where its options are those that are asked for now: mixing others in would be no comparison.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

import click

from luffy.errors import UserError
from luffy.inputs import keep_apart
from luffy.lab.place import check_ranks, current_lab
from luffy.ranges import AT_LEAST_ONE, Range
from luffy.report.compare import COMPARE_FILE, write_compare_report
from luffy.report.compare_table import text_tables
from luffy.report.runs import CONFIG_FILE, METRICS_FILE, SUMMARY_FILE, Run, read_json, read_run, write_json_atomic
from luffy.report.summaries import differences, said_to_differ, set_side_by_side, summarise
from luffy.train.entries import Entry, parse_entries
from luffy.train.launch import under_torchrun
from luffy.train.options import TrainOptions
from luffy.train.run import start

# Options that may differ between a run and its continuation: none changes what is computed or how fast.
_FREE = {"out", "resume", "overwrite", "timeout_seconds", "cache_dir", "keep_checkpoints", "export", "interface",
         "max_restarts", "min_ranks", "async_checkpoints"}  # fmt: skip


@dataclass(frozen=True)
class Comparison:
    """`luffy compare`: `recipes` is the text of --recipes, `options` those that all runs share."""

    recipes: str
    options: TrainOptions
    repeats: int = 1
    vary_seed: bool = False
    target_loss: float | None = None
    also: tuple[str, ...] = ()
    discard_checkpoints: bool = False

    def run(self) -> list[dict[str, Any]]:
        """Train what is not finished; write compare.json and report.html to --out; the summaries, one a recipe.

        Raises UserError, before the first run, for whatever can be seen by then.
        """
        if under_torchrun():
            raise UserError("luffy compare starts its own ranks (--ranks); run it without torchrun")
        AT_LEAST_ONE.check("--repeats", self.repeats)
        Range(0, above=True).check("--target-loss", self.target_loss)
        entries = parse_entries(self.recipes)
        elsewhere = [(Path(name), read_run(name, "--also")) for name in self.also]
        plan = [(entry, self._of(entry, r)) for r in range(self.repeats) for entry in entries]
        todo = [(entry, run) for entry, run in plan if not _finished(run)]
        for entry, run in plan:
            if (entry, run) not in todo:
                click.echo(f"== {Path(run.out).name}: already finished", err=True)
        for number, (_, run) in enumerate(todo, start=1):
            click.echo(f"== {Path(run.out).name} ({number} of {len(todo)})", err=True)
            start(run)
            if self.discard_checkpoints:
                shutil.rmtree(Path(run.out) / "checkpoints", ignore_errors=True)
        summaries, runs = [], []
        for entry in entries:
            folders = [Path(run.out) for planned, run in plan if planned is entry]
            runs.append([read_run(folder) for folder in folders])
            about = {"own_options": entry.options, "folders": [folder.name for folder in folders]}
            summaries.append(summarise(entry.label, runs[-1]) | about)
        for folder, other in elsewhere:
            runs.append([other])
            summaries.append(self._elsewhere(folder, other, runs[0][0], [s["label"] for s in summaries]))
        set_side_by_side(summaries, runs, self.target_loss)
        out = Path(self.options.out)
        write_json_atomic(out / COMPARE_FILE, summaries)
        click.echo(text_tables(summaries))
        click.echo(f"numbers:     {out / COMPARE_FILE}")
        click.echo(f"report:      {write_compare_report(out)}")
        return summaries

    def _of(self, entry: Entry, repeat: int) -> TrainOptions:
        """The options of repeat `repeat` (from 0) of a recipe; all that can be checked of them is."""
        folder = entry.folder + (f".{repeat + 1}" if repeat else "")
        seed = self.options.seed + (repeat if self.vary_seed else 0)
        run = replace(entry.apply(self.options), out=str(Path(self.options.out) / folder), seed=seed)
        lab = current_lab()
        if lab is not None:
            run = replace(run, ranks=check_ranks(lab, run.ranks))
        run.check_world(run.ranks)
        for name in self.also:
            keep_apart(run.out, {"--also": name})
        if (Path(run.out) / METRICS_FILE).exists() and not (run.resume or run.overwrite):
            raise UserError(f"--out {run.out} already holds a run; add --resume, --overwrite, or choose another folder")
        return run

    def _elsewhere(self, folder: Path, run: Run, first: Run, labels: list[str]) -> dict[str, Any]:
        """The summary of a run that another system, or another command, made."""
        label = str(run.summary.get("label") or run.summary.get("recipe") or folder.name)
        if label in labels:
            label = f"{label} ({folder.name})"
        about = {"elsewhere": True, "differs": [*said_to_differ(run), *differences(run, first)]}
        defaults = {"recipe": label, "model": "", "folders": [str(folder.resolve())]}
        return defaults | summarise(label, [run]) | about


def _finished(run: TrainOptions) -> bool:
    """Whether `run` is there, whole. Raises UserError where its folder holds a run with other options."""
    folder = Path(run.out)
    config, summary = read_json(folder / CONFIG_FILE), read_json(folder / SUMMARY_FILE)
    if run.overwrite or "options" not in config:
        return False
    default = {f.name: f.default for f in fields(TrainOptions)}
    before = default | config["options"]
    other = [name for name, value in run.to_dict().items() if name not in _FREE and before[name] != value]
    named = [f"--{name.replace('_', '-')} {before[name]}" for name in other]
    if summary and _links(summary.get("lab")) != _links(lab.describe() if (lab := current_lab()) else None):
        named.append("other links")
    if named:
        raise UserError(
            f"--resume: {folder} holds a run with {', '.join(named)}; choose another --out, or add --overwrite in "
            "place of --resume"
        )
    return bool(summary)


def _links(lab: dict[str, Any] | None) -> Any:
    """What was asked of a lab, without what its links were then found to give."""
    return None if lab is None else {key: value for key, value in lab.items() if key != "links"}
