"""What an exactness test needs around the oracle: test data, test weights, a sharded model as one dict.

A fresh model hides mistakes: its biases are zero, its norms one, its router almost undecided.
`vivid_parameters` makes weights that a forgotten bias, a norm applied twice or a swapped expert cannot
survive; `load_full` deals them to the ranks, `gather_full` collects parameters or gradients again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Literal, cast

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from luffy.data.loader import IGNORE_INDEX, Sequence
from luffy.model import Transformer, expert_parameters


def relative_error(actual: Tensor | np.ndarray, expected: Tensor | np.ndarray) -> float:
    """max |actual - expected| / max |expected|; zero where both are exactly zero or have no element."""
    a, b = (torch.as_tensor(x).detach().double() for x in (actual, expected))
    if a.shape != b.shape:
        raise ValueError(f"shapes differ: {tuple(a.shape)} and {tuple(b.shape)}")
    if a.numel() == 0 or torch.equal(a, b):
        return 0.0
    error = float((a - b).abs().max() / b.abs().max().clamp_min(1e-300))
    return error if error == error else float("inf")


def largest_error(actual: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[float, str]:
    """The largest `relative_error` over two dicts of the same names, and the name it belongs to."""
    if set(actual) != set(expected):
        raise ValueError(f"names differ: {sorted(set(actual) ^ set(expected))}")
    return max((relative_error(actual[name], expected[name]), name) for name in expected)


def random_sequences(
    count: int,
    vocab_size: int,
    *,
    seed: int = 0,
    shortest: int = 3,
    longest: int = 16,
    lengths: Literal["uneven", "short", "equal"] = "uneven",
    labelled: float = 1.0,
) -> list[Sequence]:
    """`count` sequences with random tokens and labels.

    lengths: "uneven" lie in [shortest, longest]; "short" has a sequence of one token at each odd place and
    of two at every fourth; "equal" are all `longest`. labelled: the share of tokens that have a label.
    """
    generator = np.random.default_rng(seed)
    sequences = []
    for i in range(count):
        length = longest if lengths == "equal" else int(generator.integers(shortest, longest + 1))
        if lengths == "short" and i % 4 != 0:
            length = 1 if i % 2 else 2
        labels = generator.integers(0, vocab_size, length)
        labels[generator.random(length) >= labelled] = IGNORE_INDEX
        sequences.append(Sequence(i, generator.integers(0, vocab_size, length), labels, False))
    return sequences


def _random(name: str, seed: int, shape: torch.Size) -> Tensor:
    digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def vivid_parameters(model: Transformer, seed: int = 0) -> dict[str, Tensor]:
    """Full float64 parameters for `model`, a function of (seed, name) alone: the same at every number of
    ranks.

    Nothing is zero, nothing one, and routers are sure enough of themselves for the losses to feel their
    weights. With a choice bias in use, `choice_bias` of each router is among them.
    """
    router, params, experts = model.config.router, {}, expert_parameters(model)
    for name, p in model.named_parameters():
        shape = torch.Size((router.num_experts, *p.shape[1:])) if name in experts else p.shape
        values = _random(name, seed, shape)
        if name.endswith("norm.weight"):
            params[name] = 1 + 0.2 * values
        elif "embedding" in name or "router" in name:
            params[name] = 0.5 * values
        elif p.dim() >= 2 and not name.endswith(("b_in", "b_out", "content_bias", "position_bias")):
            fan_in = shape[-2] if name in experts else shape[-1]
            params[name] = values * fan_in**-0.5
        else:
            params[name] = 0.2 * values
    if router.bias_update_rate > 0:
        for name, b in model.named_buffers():
            if name.endswith("choice_bias"):
                params[name] = 0.2 * _random(name, seed, b.shape)
    return params


@torch.no_grad()
def load_full(model: Transformer, params: Mapping[str, Tensor]) -> None:
    """Give `model` its part of full parameters: the experts that fill this rank's slots, and all else."""
    mesh, experts = model.runtime.comm.mesh, expert_parameters(model)
    for name, target in [*model.named_parameters(), *model.named_buffers()]:
        if name not in params:
            continue
        value = params[name]
        if name in experts:
            by_slot = value[torch.argsort(experts[name].slot_of_expert.cpu())]
            value = by_slot[mesh.ep_rank * target.shape[0] : (mesh.ep_rank + 1) * target.shape[0]]
        target.copy_(value)


@torch.no_grad()
def gather_full(model: Transformer, kind: Literal["param", "grad"] = "param") -> dict[str, Tensor]:
    """All parameters, or all gradients of the step, in full on every rank; experts in order of their ids.

    Gradients of replicated parameters are summed over the world, those of experts over their copies in the
    data-parallel groups: what a training step does. A parameter without any gradient is an error here, since
    it would hold up every other rank.
    """
    mesh, full = model.runtime.comm.mesh, {}
    values, layers = {}, expert_parameters(model)
    for name, p in model.named_parameters():
        if kind == "grad" and p.grad is None:
            raise AssertionError(f"rank {mesh.rank}: {name} has no gradient")
        values[name] = p.detach() if kind == "param" else cast(Tensor, p.grad)
    for experts, copies in ((False, mesh.world_group), (True, mesh.dp_group)):
        names = [name for name in values if (name in layers) == experts]
        if not names:
            continue
        # One message for all of them: the ranks of a test share few cores, and each message wakes every rank.
        flat = torch.cat([values[name].flatten() for name in names])
        if kind == "grad":
            dist.all_reduce(flat, group=copies)
        parts = [flat]
        if experts:
            parts = [torch.empty_like(flat) for _ in range(mesh.ep_size)]
            dist.all_gather(parts, flat, group=mesh.ep_group)
        sizes = [values[name].numel() for name in names]
        for name, *slots in zip(names, *(part.split(sizes) for part in parts), strict=True):
            value = torch.cat([slot.view_as(values[name]) for slot in slots])
            full[name] = value[layers[name].slot_of_expert] if experts else value
    return {name: full[name] for name in values}
