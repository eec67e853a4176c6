"""What is looked at on the way through a MoE layer: choices for traces, rows by sequence for seats, the forecast."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from luffy.compose import Runtime
from luffy.exchange.copies import copy_keys
from luffy.exchange.dispatcher import Forecast, Tokens
from luffy.exchange.migrate import counts_per_sequence


def observe(tokens: Tokens, predict_next: Callable[[Tensor], Forecast] | None, runtime: Runtime) -> Tokens:
    """Note what is to be noted in this step; the tokens, with a forecast for whoever asks for one."""
    hidden, layout, ep = tokens.hidden, tokens.batch.layout, runtime.comm.mesh
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
    if runtime.observed is not None:
        keys = copy_keys(tokens.topk_expert_ids, tokens.experts, ep.ep_rank, "ranks")
        runtime.observed.append((layout, counts_per_sequence(keys, layout, ep.ep_size, layout.num_sequences)))
    return tokens
