"""Training with the dense oracle: gradients by autograd, then a plain loop of AdamW steps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from luffy.config import ModelConfig
from luffy.testing.oracle import IGNORED, Condensing, Memory, OracleOutput, Params, forward


@dataclass(frozen=True)
class OracleStep:
    """`loss` and `gradients` of one optimizer step; `outputs`: one a micro-batch."""

    loss: float
    gradients: dict[str, Tensor]
    outputs: list[OracleOutput]


def leaves(params: Params) -> dict[str, Tensor]:
    """Copies in float64 that ask for a gradient, except a router's `choice_bias`, which is not trained."""
    return {
        name: p.detach().double().clone().requires_grad_(not name.endswith("choice_bias")) for name, p in params.items()
    }


def oracle_step(
    config: ModelConfig,
    params: Params,
    micro_batches: Sequence[Sequence[Any]],
    memories: Sequence[Memory] | None = None,
    condensing: Sequence[Condensing] | None = None,
    num_topics: int = 0,
) -> OracleStep:
    """Loss and all gradients of one step; `memories` holds what each micro-batch remembers.

    condensing: of the layers of a single micro-batch.
    Parameters that no token touched (an idle expert) get a gradient of zeros, never None.
    """
    variables = leaves(params)
    tokens = sum(len(s.tokens) for micro in micro_batches for s in micro)
    labels = sum(int(y != IGNORED) for micro in micro_batches for s in micro for y in s.labels)
    outputs = [
        forward(
            config, variables, micro, tokens, max(labels, 1), memories[i] if memories else None, condensing, num_topics
        )
        for i, micro in enumerate(micro_batches)
    ]
    loss = torch.stack([out.loss for out in outputs]).sum()
    loss.backward()
    gradients = {
        name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in variables.items() if p.requires_grad
    }
    return OracleStep(float(loss.detach()), gradients, outputs)


def oracle_train(
    config: ModelConfig,
    params: Params,
    steps: Sequence[Sequence[Sequence[Any]]],
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decays: Callable[[str], bool] = lambda name: True,
    clip_norm: float | None = None,
    num_topics: int = 0,
) -> tuple[list[float], dict[str, Tensor]]:
    """The losses of `steps` (each a list of micro-batches) and the parameters after them.

    decays: whether the parameter of that name is subject to `weight_decay`.
    clip_norm: scale the gradients of a step to at most this norm, taken over all of them together.
    With `memory_length`, micro-batch i of a step continues the segments of micro-batch i of the step before.
    """
    variables = leaves(params)
    trained = {name: p for name, p in variables.items() if p.requires_grad}
    groups = [
        {"params": [p for name, p in trained.items() if decays(name) == yes], "weight_decay": decay}
        for yes, decay in ((True, weight_decay), (False, 0.0))
    ]
    optimizer = torch.optim.AdamW([g for g in groups if g["params"]], lr=lr, betas=betas, eps=eps)
    losses: list[float] = []
    memories: list[Memory] | None = None
    for micro_batches in steps:
        step = oracle_step(config, variables, micro_batches, memories, num_topics=num_topics)
        losses.append(step.loss)
        for name, p in trained.items():
            p.grad = step.gradients[name]
        if clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(trained.values(), clip_norm)
        optimizer.step()
        if config.memory_length:
            memories = [out.memory for out in step.outputs]
    return losses, {name: p.detach() for name, p in variables.items()}
