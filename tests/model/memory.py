"""Consecutive segments through a model with memory, on ranks and by the oracle."""

from __future__ import annotations

from typing import Any

import torch

from luffy.data.loader import Sequence
from luffy.testing import OracleStep, gather_full, oracle_step, random_sequences
from luffy.train.batching import gather_step, make_micro_batch

from .cases import Case, build, share_of


def segments(case: Case, count: int, length: int) -> list[list[Sequence]]:
    """`count` batches in which place i continues the text of place i."""
    return [
        random_sequences(case.batch, case.config.vocab_size, seed=s, lengths="equal", longest=length)
        for s in range(count)
    ]


def train_on_segments(rank: int, case: Case, count: int, length: int) -> dict[str, Any]:
    """Of each segment: loss, gradients, and what all ranks together remember after it, [batch, M, D] a block."""
    model, comm = build(case)
    initial = {name: p.numpy().copy() for name, p in gather_full(model).items()}
    memory, results = None, []
    for batch in segments(case, count, length):
        model.zero_grad()
        mine = share_of(batch, comm)
        step = gather_step([mine], comm)
        out = model(make_micro_batch(mine, 0, step, comm, padded=case.padded, memory=memory))
        out.loss.backward()
        memory = out.memory
        assert not any(m.requires_grad for m in memory)
        loss = float(comm.all_reduce(out.loss.detach().clone()))
        gradients = {name: g.numpy() for name, g in gather_full(model, "grad").items()}
        results.append((loss, gradients, [comm.all_gather_world(m).flatten(0, 1).numpy() for m in memory]))
    return {"initial": initial, "segments": results}


def train_on_segments_by_oracle(
    case: Case, initial: dict[str, torch.Tensor], count: int, length: int, remember: bool = True
) -> list[OracleStep]:
    steps: list[OracleStep] = []
    for batch in segments(case, count, length):
        memories = [out.memory for out in steps[-1].outputs] if steps and remember else None
        steps.append(oracle_step(case.config, initial, [batch], memories))
    return steps
