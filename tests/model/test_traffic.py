"""Bytes of a whole training step, from the oracle's choices: every layer, every collective, every direction."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from exchange.expected import ExpectedTraffic, Size

from luffy.comm import LINK_CLASSES
from luffy.recipes import get_recipe
from luffy.testing import gather_full, oracle_step, run_ranks

from .cases import Case, build, run_step, shrunk, tensors

WORLD = 4
FLOAT = 8  # bytes of a float64, an int64


def step_job(rank: int, case: Case) -> tuple[dict[str, np.ndarray], np.ndarray]:
    model, comm = build(case, ranks_per_node=2)
    initial = {name: p.numpy().copy() for name, p in gather_full(model).items()}
    run_step(model, comm, case, case.data()[0])
    counts = comm.meter.read()
    counts[:, LINK_CLASSES.index("local")] = 0
    return initial, counts


def ids_of(served: list[torch.Tensor], top_k: int) -> np.ndarray:
    """Sequences' served choices, bool [length, E] each -> ids [T, K], -1 where there is none, in any order."""
    ids = np.full((sum(len(s) for s in served), top_k), -1)
    for token, row in enumerate(torch.cat(served)):
        chosen = row.nonzero().flatten().numpy()
        ids[token, : len(chosen)] = chosen
    return ids


@pytest.mark.parametrize(
    ("preset", "recipe", "ep_size", "recompute", "changes"),
    [
        ("moe-gpt2-tiny", "vanilla", 4, False, {"top_k": 4}),
        ("moe-llm-tiny", "vanilla_dedup", 4, True, {"top_k": 4, "capacity_factor": 0.7}),
        ("moe-bert-large-tiny", "vanilla_dedup", 2, False, {"moe_every": 2}),
        ("moe-transformer-xl-tiny", "vanilla", 2, True, {}),
    ],
)
def test_a_training_step(preset: str, recipe: str, ep_size: int, recompute: bool, changes: dict) -> None:
    """Two micro-batches on two nodes. Recomputing activations must not send anything a second time."""
    config = shrunk(preset, **changes)
    case = Case(config, WORLD, ep_size, recipe, recompute=recompute, batch=8, micro_batches=2)
    answers = run_ranks(step_job, WORLD, case)
    initial, measured = answers[0][0], np.stack([counts for _, counts in answers])

    expected, everyone, per_rank = ExpectedTraffic(), range(WORLD), case.batch // WORLD
    experts_each = config.router.num_experts // ep_size
    owner = [e // experts_each for e in range(config.router.num_experts)]
    size = Size(get_recipe(recipe).copies, row=config.hidden_size * FLOAT, weight=FLOAT)
    # Once a step: labels and lengths of each micro-batch; and the sum of the losses that `run_step` returns.
    expected.all_gather(everyone, case.micro_batches * (1 + per_rank) * FLOAT)
    expected.all_reduce(everyone, 2 * FLOAT)
    for output in oracle_step(config, tensors(initial), case.data()[0]).outputs:
        # By layer: choices and probabilities of each expert; z, entropy, dropped, condensed (2).
        expected.all_reduce(everyone, config.num_moe_layers * (2 * config.router.num_experts + 5) * FLOAT)
        for layer in output.layers:
            routings = [ids_of(layer.served[r * per_rank : (r + 1) * per_rank], config.router.top_k) for r in everyone]
            for first in range(0, WORLD, ep_size):
                group = range(first, first + ep_size)
                expected.exchange(routings[first : first + ep_size], group, owner, size)
    np.testing.assert_array_equal(measured, expected.bytes)
