"""`python -m benchmarks.peers`: start a peer's ranks, or join those that torchrun or a lab has started."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from benchmarks.peers.registry import MODULES, get_peer, start
from benchmarks.peers.table import collect, markdown, write
from luffy.train.cli import run_group, train_options
from luffy.train.options import TrainOptions


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
def cli() -> None:
    """Train the models of the benchmarks with other systems, on Luffy's data and into Luffy's files."""


@cli.command("list")
def list_peers() -> None:
    """List the peers, and how to install them."""
    for name in MODULES:
        peer = get_peer(name)
        click.echo(f"{name:<12}  {peer.summary}\n{'':<14}{peer.install}")


@cli.command()
@click.option("--peer", required=True, help="Which system: " + ", ".join(MODULES) + ".")
@click.option("--audit-bytes", is_flag=True, help="Count every byte a second time, and stop where the counts differ.")
@train_options
def run(peer: str, audit_bytes: bool, **values: Any) -> None:
    """Train with --peer on --ranks ranks. Options are those of `luffy train`; --recipe is ignored."""
    start(peer, replace(TrainOptions(**values), recipe="vanilla"), audit_bytes)


@cli.command()
@click.argument("runs", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--times", is_flag=True, help="Seconds, tokens and memory too: of an idle machine only.")
@click.option("--json", "target", type=click.Path(path_type=Path), help="Write the numbers here.")
def table(runs: tuple[Path, ...], times: bool, target: Path | None) -> None:
    """Put the runs in folders RUNS, of peers and of Luffy, side by side."""
    rows = collect(runs, times)
    if target is not None:
        write(rows, target)
    click.echo(markdown(rows))


if __name__ == "__main__":
    run_group(cli, "python -m benchmarks.peers", "peers")
