"""Run one micro-batch with its sequences and experts on any ranks, however uneven, and compare with the oracle."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from luffy.comm import Comm, build_mesh
from luffy.config import ModelConfig
from luffy.data.batch import Layout, SequenceTable
from luffy.data.loader import IGNORE_INDEX
from luffy.data.loader import Sequence as TokenSequence
from luffy.model import MicroBatch, Runtime, build_model
from luffy.recipes import Recipe, get_recipe
from luffy.testing import (
    OracleStep,
    gather_full,
    largest_error,
    load_full,
    oracle_step,
    run_ranks,
    vivid_parameters,
)

from .cases import TOLERANCE, tensors


@dataclass(frozen=True)
class Trial:
    """home_rank: the rank of each sequence. slots: a permutation of the experts' places, None for their own.

    choice_bias: one number an expert, in every layer; steers the choice where the configuration uses the bias.
    """

    sequences: list[TokenSequence]
    home_rank: tuple[int, ...]
    recipe: str | Recipe = "vanilla_dedup"
    padded: bool = False
    recompute: bool = False
    slots: tuple[int, ...] | None = None
    choice_bias: tuple[float, ...] | None = None


def place(trial: Trial, comm: Comm) -> MicroBatch:
    """This rank's part of the trial's only micro-batch, built without the loader's equal shares."""
    lengths = np.array([len(s.tokens) for s in trial.sequences])
    table = SequenceTable(lengths, np.array(trial.home_rank))
    layout = Layout(table, comm.mesh.ep_rank, comm.mesh.device)
    mine = [trial.sequences[i] for i in layout.sequences]

    def flat(arrays: list[np.ndarray]) -> torch.Tensor:
        return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *arrays]))

    return MicroBatch(
        tokens=flat([s.tokens for s in mine]),
        labels=flat([s.labels for s in mine]),
        layout=layout,
        num_tokens=table.num_tokens,
        step_tokens=table.num_tokens,
        step_labels=sum(int((s.labels != IGNORE_INDEX).sum()) for s in trial.sequences),
        padded=trial.padded,
    )


def try_all(rank: int, config: ModelConfig, trials: Sequence[Trial]) -> list[dict[str, Any]]:
    """For each trial the weights it ran with, the loss over all ranks and all gradients in full."""
    results = []
    comm = Comm.create(build_mesh(torch.device("cpu")))
    for trial in trials:
        recipe = trial.recipe if isinstance(trial.recipe, Recipe) else get_recipe(trial.recipe)
        runtime = Runtime.create(comm, recipe, config, trial.recompute)
        model = build_model(config, runtime, dtype=torch.float64)
        params = vivid_parameters(model)
        if trial.choice_bias is not None:
            bias = torch.tensor(trial.choice_bias, dtype=torch.float64)
            params |= {name: bias for name in params if name.endswith("choice_bias")}
        if trial.slots is not None:
            for layer in model.moe_layers:
                layer.slot_of_expert.copy_(torch.tensor(trial.slots))
        load_full(model, params)
        out = model(place(trial, comm))
        out.loss.backward()
        loss = comm.all_reduce(out.loss.detach().clone())
        gradients = gather_full(model, "grad")
        results.append(
            {
                "loss": float(loss),
                "initial": {name: p.numpy() for name, p in params.items()},
                "gradients": {name: g.numpy() for name, g in gradients.items()},
            }
            if rank == 0
            else {}
        )
    return results


def assert_all_exact(config: ModelConfig, world: int, trials: Sequence[Trial]) -> list[OracleStep]:
    """Every trial agrees with the oracle, which has no ranks; returns what the oracle says of each."""
    steps = []
    for trial, result in zip(trials, run_ranks(try_all, world, config, trials)[0], strict=True):
        step = oracle_step(config, tensors(result["initial"]), [trial.sequences])
        about = f"home {trial.home_rank}, {trial.recipe}, padded={trial.padded}, recompute={trial.recompute}"
        assert abs(result["loss"] - step.loss) <= TOLERANCE * abs(step.loss), about
        error, name = largest_error(tensors(result["gradients"]), step.gradients)
        assert error <= TOLERANCE, f"gradient of {name}: relative error {error:.1e} ({about})"
        for name, gradient in step.gradients.items():
            # An expert without tokens: exactly zero, not nearly.
            if not gradient.any():
                assert not result["gradients"][name].any(), f"{name} should have a gradient of zeros ({about})"
        steps.append(step)
    return steps
