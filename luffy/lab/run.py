"""One lab from beginning to end: check, build, measure, run the command, leave nothing behind."""

from __future__ import annotations

import os
from dataclasses import replace

import click

from luffy.errors import UserError
from luffy.lab import gpus
from luffy.lab.namespace import missing_capabilities
from luffy.lab.network import Network, import_pyroute2
from luffy.lab.place import VARIABLE, Lab, process_identity
from luffy.lab.probe import measure, table
from luffy.lab.processes import Command, end_all, resolve, starts_its_own_ranks, stopped_by_signals, sweep, undisturbed
from luffy.lab.spec import LabSpec


def run_lab(spec: LabSpec, command: list[str], per_rank: bool | None = None) -> int:
    """Run `command` in a cluster as `spec` describes; its exit status.

    A command that starts its own ranks (this library's) runs once, and its ranks take their places in the lab. Any
    other runs once per rank with torchrun's environment; `per_rank` overrides that guess. Raises UserError where this
    machine does not allow a lab.
    """
    import_pyroute2()
    missing = missing_capabilities()
    if missing:
        raise UserError(
            f"luffy lab needs root ({' and '.join(missing)}) to make networks; run it as root, say with sudo"
        )
    command = resolve(command)
    if per_rank is None:
        per_rank = not starts_its_own_ranks(command)
    identity = process_identity(os.getpid())
    assert identity is not None
    with stopped_by_signals():
        left = sweep()
        if left:
            click.echo(f"ended what {left} lab{'s' if left > 1 else ''} before this one had left running", err=True)
        network = Network(spec)
        try:
            lab = _measured(network, identity)
            here = gpus.count_gpus()
            with gpus.sharing(spec.ranks, here, os.environ | {VARIABLE: lab.to_json()}) as (how, variables):
                if line := gpus.describe(how, spec.ranks, here):
                    click.echo(line, err=True)
                return Command(command, replace(lab, gpus_shared=how), per_rank, variables).wait()
        finally:
            with undisturbed():
                end_all(identity, patience=1.0)
                network.close()


def _measured(network: Network, identity: str) -> Lab:
    """Measure the links and say what they give, before the command and to it."""
    spec = network.spec
    reports = measure(network)
    shape = f"{spec.nodes} x {spec.ranks_per_node}" if spec.nodes > 1 else str(spec.ranks)
    click.echo(f"lab of {shape} ranks" + (f" (--topology {spec.topology})" if spec.topology else ""), err=True)
    if reports:
        click.echo(table(reports, spec.nic), err=True)
    return Lab(
        identity=identity,
        ranks=spec.ranks,
        nodes=spec.nodes,
        nic=spec.nic,
        latency_seconds=spec.latency_seconds,
        topology=spec.topology,
        namespaces=[f"/proc/{os.getpid()}/fd/{handle}" for handle in network.namespaces],
        addresses=[spec.address(rank) for rank in range(spec.ranks)],
        links={name: report.to_dict() for name, report in reports.items()},
    )
