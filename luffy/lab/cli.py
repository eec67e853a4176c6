"""`luffy lab`: the options."""

from __future__ import annotations

import sys

import click

from luffy.errors import UserError


@click.command(
    short_help="Run a command on an emulated cluster (root).", context_settings={"allow_interspersed_args": False}
)
@click.option("--ranks", type=int, required=True, help="Ranks, each in a network of its own.")
@click.option("--link", metavar="RATE", help="Rate of a rank's link, each direction: 8gbit, 1GB/s (default: no limit).")
@click.option("--nodes", type=int, default=1, show_default=True, help="Nodes, of equally many ranks each.")
@click.option("--inter-link", metavar="RATE", help="Rate of a network card, each direction; needs --nodes.")
@click.option("--nic", default="node", show_default=True, help="One network card for each node, or for each rank.")
@click.option("--latency", metavar="TIME", help="One-way delay of a link, such as 50us (needs the kernel's netem).")
@click.option(
    "--per-rank/--once",
    default=None,
    help="Start COMMAND on every rank, as torchrun does, or once (default: as described above).",
)
@click.argument("command", nargs=-1, type=click.UNPROCESSED)
def lab(
    ranks: int,
    link: str | None,
    nodes: int,
    inter_link: str | None,
    nic: str,
    latency: str | None,
    per_rank: bool | None,
    command: tuple[str, ...],
) -> None:
    """Run COMMAND on an emulated cluster: each rank of this machine stands behind a link of the given rate. Needs root.

    \b
    luffy lab --ranks 4 --link 1gbit -- luffy train --recipe luffy
    luffy lab --ranks 8 --nodes 2 --link 16gbit --inter-link 4gbit -- luffy compare --recipes vanilla,luffy
    luffy lab --ranks 4 --link 1gbit -- python any_torchrun_script.py

    The links are measured first, and the result is printed. `luffy train` and `luffy compare` start one rank for each
    rank of the lab. Any other command is started once on every rank, with the environment variables of torchrun; use
    --once for a script that calls luffy itself. The exit status is the command's.
    """
    from luffy.lab.run import run_lab
    from luffy.lab.spec import read_spec

    if not command:
        raise UserError("luffy lab: no command; say what to run after --, such as -- luffy train")
    sys.exit(run_lab(read_spec(ranks, link, nodes, inter_link, nic, latency), list(command), per_rank))
