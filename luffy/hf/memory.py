"""What a rank will need, said before the start: weights, gradients, moments, and about how much for activations."""

from __future__ import annotations

import torch

from luffy.comm.sharding import local_part
from luffy.hf.model import ParallelModel
from luffy.report.units import format_bytes

# Rows of the stream that a layer keeps for its backward pass: inputs and outputs of norms, projections and attention.
_ROWS_A_LAYER = 12


def needed_bytes(parallel: ParallelModel, num_tokens: int) -> dict[str, int]:
    """By kind, on this rank. num_tokens: of its rows in a forward pass; experts are taken to be used alike.

    Weights, gradients and AdamW's two moments are counted; activations are an estimate.
    """
    parameters = [local_part(p) for p in parallel.parameters()]
    trained = [local_part(p) for p in parallel.parameters() if p.requires_grad]
    weights, gradients = (sum(p.numel() * p.element_size() for p in group) for group in (parameters, trained))
    config, size = parallel.config, parallel.stream_dtype.itemsize
    width = config.hidden_size
    rows = num_tokens * config.router.top_k  # of experts: input, gate and up, their product, output
    expert = rows * (2 * width + 3 * config.expert_hidden_size)
    layer = num_tokens * width * _ROWS_A_LAYER
    if parallel.runtime.recompute:  # the stream and the rows that came; one layer at a time is whole
        kept = config.num_layers * (num_tokens * width * 2 + rows * width) + layer + expert
    else:
        kept = config.num_layers * layer + config.num_moe_layers * expert
    logits = min(num_tokens, 1024) * config.vocab_size * 2 * 4
    return {"weights": weights, "gradients": gradients, "moments": 2 * gradients, "activations": kept * size + logits}


def memory_line(parallel: ParallelModel, num_tokens: int) -> str:
    """One line for the first rank to print, with the options that would save something."""
    need = needed_bytes(parallel, num_tokens)
    parts = ", ".join(f"{name} {format_bytes(n)}" for name, n in need.items() if name != "activations")
    line = f"memory a rank: {parts}, activations about {format_bytes(need['activations'])}"
    device = parallel.runtime.comm.mesh.device
    if device.type == "cuda":
        line += f", of {format_bytes(torch.cuda.get_device_properties(device).total_memory)}"
    savers = []
    if not parallel.runtime.recompute:
        savers.append("--recompute (activations)")
    if parallel.units is None and parallel.runtime.comm.mesh.world_size > 1:
        savers.append("--dense sharded (attention, embedding, head)")
    if all(p.requires_grad for p in parallel.parameters()):
        savers.append("--lora (gradients, moments)")
    return line + (f"; less with {', '.join(savers)}" if savers else "")
