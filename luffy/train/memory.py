"""Sizes that cannot fit: refused before anything is made, with the arithmetic.

A lower bound only. It counts what a rank must hold whatever else happens: weights, gradients, two moments of AdamW, and
the stream between blocks. What it lets through may still not fit.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import torch

from luffy.config import ModelConfig
from luffy.errors import UserError
from luffy.report.units import format_bytes


@dataclass(frozen=True)
class Need:
    """Bytes that a rank cannot do without. parts: what they are for, in words, with a number of bytes."""

    parts: dict[str, int]

    @property
    def num_bytes(self) -> int:
        return sum(self.parts.values())

    def check(self, device: torch.device, options: str) -> None:
        """UserError if this does not fit the GPU, or this rank's share of the machine; `options` names the mend."""
        have, where = memory_of(device)
        if self.num_bytes <= have:
            return
        sums = " + ".join(f"{format_bytes(size)} {what}" for what, size in self.parts.items())
        raise UserError(
            f"a rank needs at least {format_bytes(self.num_bytes)} ({sums}) and has {format_bytes(have)} ({where}); "
            f"make it smaller with {options}, or take more ranks"
        )


def memory_of(device: torch.device) -> tuple[int, str]:
    """Bytes that a rank on `device` can have at most, and whose they are."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory, "its GPU"
    local = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    with open("/proc/meminfo", encoding="utf-8") as f:
        total = 1024 * sum(int(line.split()[1]) for line in f if line.startswith(("MemTotal", "SwapTotal")))
    return total // local, f"the machine's {format_bytes(total)} over {local} ranks"


def free_host_memory() -> int:
    """Bytes that the machine can still give."""
    with open("/proc/meminfo", encoding="utf-8") as f:
        return 1024 * next(int(line.split()[1]) for line in f if line.startswith("MemAvailable"))


def count_parameters(config: ModelConfig, ep_size: int) -> tuple[int, int]:
    """Weights of `luffy.model.Transformer` on a rank, biases and norms left out: (replicated, of its experts)."""
    D, V = config.hidden_size, config.vocab_size
    matrices = 3 if config.activation == "swiglu" else 2
    dense_layers = config.num_layers - config.num_moe_layers
    projections = 5 if config.position == "relative" else 4
    shared = config.num_shared_experts * config.expert_hidden_size
    replicated = V * D * (1 if config.tie_embeddings else 2) + config.num_layers * projections * D * D
    replicated += config.max_sequence_length * D if config.position == "learned" else 0
    replicated += dense_layers * matrices * D * config.dense_hidden_size
    replicated += config.num_moe_layers * (config.router.num_experts * D + matrices * D * shared)
    own = config.router.num_experts // ep_size
    replicated += config.num_moe_layers * 2 * D * config.latent_size
    return replicated, config.num_moe_layers * own * matrices * config.row_size * config.expert_hidden_size


def training_need(config: ModelConfig, ep_size: int, dtype: torch.dtype, rows: int) -> Need:
    """Of `luffy train`. rows: tokens of a micro-batch on a rank, at least. dtype: of the stream."""
    weight = 8 if dtype == torch.float64 else 4
    replicated, experts = count_parameters(config, ep_size)
    layer = rows * config.hidden_size * dtype.itemsize
    times = 4 * weight  # the weight, its gradient, two moments
    return Need(
        {
            f"for {replicated:,} weights that all ranks hold, at {times} bytes": replicated * times,
            f"for {experts:,} of its own experts": experts * times,
            f"for the stream of {rows:,} tokens in {config.num_layers} blocks": layer * config.num_layers,
        }
    )


def without_vocabulary(config: ModelConfig) -> ModelConfig:
    """The model as small as its vocabulary may turn out to be, before the data is known."""
    return replace(config, vocab_size=1)
