"""All questions that are asked of `luffy compare`, one after another within one budget of time.

    python benchmarks/run_all.py --small --budget-seconds 840 --out runs/bench-cpu           (make bench-cpu)
    python benchmarks/run_all.py --device cuda --ranks 8 --budget-seconds 560 --out runs/bench-gpu     (make bench-gpu)

When the budget is spent it stops, says how far it came, and continues at the next call; `--only a,b` asks some of
them. Each writes NAME.json and NAME.png to --out. Without root there are no emulated links: the sweep of bandwidths
is left out then, and said to be.
"""

from __future__ import annotations

import importlib
from typing import Any

import click
from compare_tools import options, run_study, settings_of

from luffy.lab.namespace import missing_capabilities

NAMES = (
    "paper_table1", "paper_table3", "paper_fig8", "paper_fig9", "paper_fig10", "paper_table4", "bandwidth_sweep",
    "scaling_ranks", "scaling_experts", "scaling_topk",
)  # fmt: skip


@click.command(help=__doc__)
@options
@click.option("--only", help="Names of questions, separated by commas.")
def main(only: str | None, budget_seconds: float, link: str | None, **values: Any) -> None:
    names = only.split(",") if only else list(NAMES)
    if unknown := sorted(set(names) - set(NAMES)):
        raise click.UsageError(f"--only {','.join(unknown)}: choose of {', '.join(NAMES)}")
    deadline, finished = None, 0
    for name in names:
        study = importlib.import_module(name).STUDY
        sweeps = bool(study.cpu_links)
        if sweeps and missing_capabilities():
            click.echo(f"{name}: left out, for it makes networks, which needs root", err=True)
            finished += 1
            continue
        one_rate = sweeps and link is not None and "," not in link  # no sweep: take the usual rates
        settings = settings_of(study, link=None if one_rate else link, budget_seconds=budget_seconds, **values)
        deadline = deadline or settings.deadline  # one budget for all of them
        finished += run_study(study, settings.until(deadline))
    state = "all are finished" if finished == len(names) else "call again to continue"
    click.echo(f"{finished} of {len(names)} questions answered: {state}", err=True)


if __name__ == "__main__":
    main()
