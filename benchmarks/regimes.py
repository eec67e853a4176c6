"""Every recipe, and other systems, behind one and the same links: where a step's time goes, and how fast a loss falls.

    python benchmarks/regimes.py --device cuda --ranks 8 --link 8gbit --out runs/regime-a -- --start-weights W ...
    python benchmarks/regimes.py --device cuda --ranks 16 --link 4gbit --out runs/regime-b -- ...
    sudo .venv/bin/python benchmarks/regimes.py --ranks 4 --link 250mbit,1gbit --out runs/regime-c      (two cores)

On a GPU the model is the paper's MoE-GPT2 (12 blocks of 768/3072, 16 experts, top-2, bfloat16, gradients too), and
`--start-weights` should name weights that were trained for some hundred steps (`luffy train --export`): routers of
an untrained model flatter whoever follows locality. Recipes run as they are and with `--overlap` (`+o`), so that none
loses by a neglected schedule; tables show all. Runs of other systems (docs/research/peers.md) join with `--also`.
"""

import json
from dataclasses import replace
from pathlib import Path

import click
from compare_tools import Cell, Study, bars, communication, options, report, run_study, settings_of, step_seconds

from luffy.report.runs import read_run
from luffy.report.summaries import set_side_by_side, summarise
from luffy.train.entries import parse_entries

# In the order in which they are wanted, should time run out.
ENTRIES = (
    "vanilla;vanilla_dedup;luffy;luffy_max=luffy_max --gradient-dtype int8;dedup+o=vanilla_dedup --overlap;"
    "luffy+o=luffy --overlap;max+o=luffy_max --overlap --gradient-dtype int8;"
    "low=vanilla_dedup --wire int4 --gradient-dtype int8;paper=luffy_paper;vanilla+o=vanilla --overlap;auto;"
    "fastermoe;netmoe;lsh_moe_causal;janus"
)
SMALL = (
    "vanilla;vanilla_dedup;luffy;luffy_max=luffy_max --gradient-dtype int8;dedup+o=vanilla_dedup --overlap;"
    "luffy+o=luffy --overlap;max+o=luffy_max --overlap --gradient-dtype int8;paper=luffy_paper;auto;janus;"
    "fastermoe;netmoe"
)


def cells(s, entries=None):
    model = ["--gradient-dtype", "bfloat16", "--locality-loss", "0.02"]
    if s.on_gpu:
        model += ["--model", "moe-gpt2", "--vocab-size", "8192", "--sequence-length", "512", "--keep-checkpoints", "0"]
        model += ["--batch-size", str(16 * s.ranks), "--eval-every", str(max(1, s.steps // 3)), "--eval-batches", "2"]
        model += ["--warmup-steps", "5", "--min-lr", "1", "--lr", "3e-4"]
    else:
        model += s.model("moe-gpt2")
        model += ["--batch-size", str(8 * s.ranks)]
    entries = entries or (SMALL if s.small else ENTRIES)
    return [Cell(f"{s.ranks} ranks, {link or 'not shaped'}", entries, model, link=link) for link in s.links]


def table(found):
    head = [
        "links",
        "recipe",
        "step s",
        "over vanilla",
        "exposed s",
        "hidden s",
        "roofline s",
        "MB/step",
        "to loss",
        "loss",
    ]
    rows = []
    for key, summaries in found.items():
        for x in summaries:
            roof = x.get("roofline") or {}
            cell = [
                key,
                x["label"],
                f"{step_seconds(x):.3f} ({x['step_seconds'][0]:.3f}-{x['step_seconds'][2]:.3f})",
                f"{x['speedup_over'].get('vanilla', 1.0):.2f}x",
                # Other systems' runs do not say where their seconds went.
                _number(communication(x) if roof else None),
                _number(x.get("exchange_hidden_seconds")),
                _number(roof.get("seconds")),
                f"{sum(x['step_bytes'].values()) / 1e6:.0f}",
                _number(x["seconds_to_loss"], "{:.1f}"),
                _number(x.get("valid_loss")),
            ]
            rows.append(cell)
    return head, rows


def _number(value, form="{:.3f}"):
    return "–" if value is None else form.format(value)


STUDY = Study(
    "regimes",
    "Every recipe behind the same links: step time, what of it is exchange, and time to vanilla's loss",
    cells,
    table,
    lambda found: bars(
        found, lambda x: x["speedup_over"].get("vanilla", 1.0), "Speed of a step", "times as fast as vanilla"
    ),
    steps=24,
    cpu_links=("250mbit", "1gbit"),
    gpu_links=("8gbit",),
)


@click.command(help=__doc__)
@options
@click.option("--entries", help="Only these, separated by semicolons, as for `luffy compare --recipes`.")
@click.option("--also", multiple=True, type=click.Path(path_type=Path), help="A peer's run, to stand in the table too.")
@click.option(
    "--collect", type=click.Path(path_type=Path), help="Run nothing: report on the finished runs in this folder."
)
@click.option("--target-loss", type=float, help="With --collect: time to this held-out loss, not to vanilla's last.")
def main(collect, entries, also, target_loss, out, **values):
    s = settings_of(STUDY, out=out, **values)
    if collect is None:
        extra = ["--also", ",".join(map(str, also))] if also else []
        study = replace(STUDY, cells=lambda s: [replace(c, extra=extra) for c in cells(s, entries)])
        run_study(study, s)
        return
    found = {}
    for cell in cells(s, entries)[:1]:
        folders = {e.label: collect / e.folder for e in parse_entries(cell.recipes)}
        folders |= {json.loads((f / "summary.json").read_text())["recipe"]: f for f in also}
        finished = {label: read_run(f) for label, f in folders.items() if (f / "summary.json").exists()}
        summaries = [summarise(label, [run]) for label, run in finished.items()]
        set_side_by_side(summaries, [[run] for run in finished.values()], target_loss)
        found[cell.key] = summaries
    # The machine is that of the runs, not this one.
    report(STUDY, s, found, False, hardware=next(iter(found.values()))[0].get("environment"))


if __name__ == "__main__":
    main()
