"""What is looked at on the way through a MoE layer: choices for traces, rows by sequence for seats, the forecast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from luffy.compose import Runtime
from luffy.exchange.copies import copy_keys
from luffy.exchange.dispatcher import Forecast, Tokens
from luffy.exchange.migrate import counts_per_sequence
from luffy.model.router import RouterStats


def observe(
    tokens: Tokens, stats: RouterStats, predict_next: Callable[[Tensor], Forecast] | None, runtime: Runtime
) -> tuple[Tokens, RouterStats]:
    """Note what is to be noted; the tokens with their copies decided, and a forecast for whoever asks for one."""
    hidden, layout, mesh = tokens.hidden, tokens.batch.layout, runtime.comm.mesh
    if predict_next is not None:
        found: list[Forecast] = []

        def forecast() -> Forecast | None:
            if not found:
                found.append(predict_next(hidden))
            return found[0]

        tokens = replace(tokens, forecast=forecast)
    if runtime.recorder.active:
        foreseen = tokens.forecast()
        runtime.recorder.note(layout, tokens.topk_expert_ids, None if foreseen is None else foreseen.topk_expert_ids)
    keys = copy_keys(tokens.topk_expert_ids, tokens.experts, mesh.ep_rank, "ranks")
    counts = counts_per_sequence(keys, layout, mesh.ep_size, layout.num_sequences)
    if runtime.observed is not None:
        runtime.observed.append(counts)
    favourite = torch.stack([counts.sum(), counts.amax(1).sum()]).to(stats.rows.dtype)
    return tokens, replace(stats, rows=favourite)
