"""The peers by name, and one run from the outside: check, launch the ranks, print one line."""

from __future__ import annotations

import importlib
import os
from functools import partial

import click
import torch

from benchmarks.peers.common import Peer, PeerRun, check_options, check_package
from benchmarks.peers.counting import ByteCounter
from luffy.errors import UserError
from luffy.train.launch import join_world
from luffy.train.options import TrainOptions
from luffy.train.run import start as start_ranks

# Adapters import their system only when a rank makes one of them, so all of these can be imported anywhere.
MODULES = {
    "hf_ep": ("hf_ep", "HuggingFaceEP"),
    "hf_ep_layer": ("hf_ep_layer", "HuggingFaceLayer"),
    "deepspeed": ("deepspeed_moe", "DeepSpeedMoE"),
}


def get_peer(name: str) -> type[Peer]:
    """The peer called `name`; raises UserError with the known names otherwise."""
    if name not in MODULES:
        raise UserError(f"--peer {name} is unknown; choose one of {', '.join(MODULES)}")
    module, peer = MODULES[name]
    return getattr(importlib.import_module(f"benchmarks.peers.{module}"), peer)


def start(name: str, options: TrainOptions, audit: bool = False) -> None:
    """Run a peer on local ranks, or as one rank of the world that torchrun or a lab describes."""
    peer = get_peer(name)
    check_package(peer)
    check_options(peer, options)
    start_ranks(options, partial(run_peer, name, audit=audit))


def run_peer(name: str, options: TrainOptions, audit: bool) -> None:
    """One rank."""
    counter = ByteCounter().install()
    if options.device == "cpu" or not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # DeepSpeed, which transformers looks for, says so otherwise
    mesh = join_world(options.device, options.backend, None, options.ranks_per_node, options.timeout_seconds)
    summary = PeerRun(get_peer(name), options, mesh, counter, audit).run()
    if summary is not None:
        loss = "" if summary.valid_loss is None else f", held-out loss {summary.valid_loss:.4f}"
        sent = sum(summary.bytes.values()) / max(summary.steps, 1) / 1e6
        click.echo(
            f"{name}: {summary.steps} steps, {summary.tokens_per_second:,.0f} tokens/s, {sent:.2f} MB a step{loss}; "
            f"{options.out}/summary.json"
        )
