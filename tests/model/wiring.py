"""Steps with coded rows, and what they put on the wire counted by hand from what routers chose and who moved."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import torch

from luffy.comm.meter import by_direction
from luffy.recipes import Recipe, get_recipe
from luffy.testing import gather_full

from .cases import Case, build, run_step, watch_block

STAY = get_recipe("vanilla_dedup")
RANDOM = Recipe("random", "random balanced plans", placement="random")


def _watch(model: torch.nn.Module) -> list[Any]:
    """(batch in, batch out) of every block, once the model has run."""
    seen: list[Any] = []
    for block in model.blocks:  # type: ignore[union-attr]
        watch_block(block, lambda before, after: seen.append((before, after)))
    return seen


def wired_steps(rank: int, case: Case, ways: list[Recipe]) -> list[dict[str, Any]]:
    """One step each way: loss, gradients, last stream by global token, bytes, and what moved where."""
    results = []
    for recipe in ways:
        model, comm = build(replace(case, recipe=recipe))
        seen = _watch(model)
        comm.meter.take()
        model.runtime.recorder.active = True
        loss = run_step(model, comm, case, case.data()[0]).tolist()
        counted = by_direction(comm.meter.read())
        trace = model.runtime.recorder.finish(comm, 0)
        last = seen[-1][1]
        stream = torch.zeros(int(trace.lengths.sum()), case.config.hidden_size, dtype=torch.float64)
        stream[last.layout.global_token] = last.hidden.detach().double()
        results.append(
            {
                "loss": loss,
                "gradients": {n: g.numpy().copy() for n, g in gather_full(model, "grad").items()},
                "stream": comm.all_reduce(stream).numpy(),
                "bytes": counted,
                "homes": [(a.table.home_rank, b.table.home_rank) for a, b in ((x.layout, y.layout) for x, y in seen)],
                "chosen": trace.chosen,
                "lengths": trace.lengths,
                "owner": [(m.slot_of_expert // m.experts.num_local).numpy() for m in model.moe_layers],
            }
        )
    return results


def rows_by_hand(result: dict[str, Any]) -> tuple[int, int, int]:
    """(dispatched rows, returned rows, tokens that moved) that left a rank, of all layers, token by token."""
    dispatch = combine = moved = 0
    sequence = np.repeat(np.arange(len(result["lengths"])), result["lengths"])
    for (before, after), chosen, owner in zip(result["homes"], result["chosen"], result["owner"], strict=True):
        for s, ids in zip(sequence, chosen, strict=True):
            ranks = {int(owner[e]) for e in ids if e >= 0}
            dispatch += sum(r != before[s] for r in ranks)
            combine += sum(r != after[s] for r in ranks)
            moved += before[s] != after[s]
    return dispatch, combine, moved


def largest_difference(a: dict[str, Any], b: dict[str, Any]) -> float:
    """Of the last stream and of every gradient, relative to the largest value there."""
    pairs = [(a["stream"], b["stream"]), *((g, b["gradients"][n]) for n, g in a["gradients"].items())]
    return max(float(np.abs(x - y).max() / max(np.abs(y).max(), 1e-30)) for x, y in pairs)
