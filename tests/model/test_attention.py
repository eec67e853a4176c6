"""Attention against the oracle's explicit matrices: packed, padded, masked, with memory."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from luffy.config import ModelConfig
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.model.attention import Attention
from luffy.testing import oracle, relative_error, run_ranks

from .cases import TOLERANCE, Case, shrunk, tensors
from .memory import train_on_segments, train_on_segments_by_oracle

KINDS = [
    {"position": position, "causal": causal, "qk_norm": qk_norm, "bias": bias}
    for position in ("learned", "rope", "relative")
    for causal in (True, False)
    for qk_norm, bias in ((False, True), (True, False))
]


def attention(config: ModelConfig) -> tuple[Attention, dict[str, Tensor]]:
    """A float64 attention with random weights, and the same weights under the oracle's names."""
    module = Attention(config).double()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(torch.randn(p.shape, generator=generator, dtype=torch.float64) * (0.3 if p.dim() > 1 else 1.0))
    return module, {"a." + name: p.detach().requires_grad_() for name, p in module.named_parameters()}


def batch_of(x: Tensor, lengths: list[int], padded: bool) -> TokenBatch:
    table = SequenceTable(np.array(lengths), np.zeros(len(lengths), dtype=np.int64))
    return TokenBatch(x, Layout(table, 0, x.device), padded)


@pytest.mark.parametrize("kind", KINDS, ids=lambda k: "-".join(map(str, k.values())))
@settings(max_examples=8)
@given(lengths=st.lists(st.integers(1, 9), min_size=1, max_size=5), seed=st.integers(0, 99))
def test_packed_and_padded_are_the_oracle(kind: dict[str, Any], lengths: list[int], seed: int) -> None:
    """Outputs and all gradients. Padding must be neither seen as a key nor receive a gradient."""
    config = ModelConfig(hidden_size=12, num_heads=2, **kind)
    module, params = attention(config)
    x = torch.randn(sum(lengths), 12, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    x.requires_grad_()
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    expected = torch.cat([oracle.attention(config, params, "a", s, s[:0]) for s in x.split(lengths)])
    leaves = [x, *params.values()]
    expected_grads = torch.autograd.grad((expected * weight).sum(), leaves, allow_unused=True)
    for padded in (False, True):
        actual = module(x, batch_of(x, lengths, padded))
        assert relative_error(actual, expected) < TOLERANCE
        grads = torch.autograd.grad((actual * weight).sum(), [x, *module.parameters()], allow_unused=True)
        for name, got, want in zip(["x", *params], grads, expected_grads, strict=True):
            assert got is not None and want is not None, name
            # Softmax does not feel a bias of all keys: zero but for rounding, on both sides.
            assert float((got - want).abs().max()) <= TOLERANCE * max(float(want.abs().max()), 1e-3), name


@pytest.mark.parametrize("memory_length", [1, 3, 8])
@pytest.mark.parametrize("qk_norm", [False, True])
def test_attention_to_memory(memory_length: int, qk_norm: bool) -> None:
    config = ModelConfig(hidden_size=12, num_heads=2, position="relative", memory_length=memory_length, qk_norm=qk_norm)
    module, params = attention(config)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(2 * 5, 12, generator=generator, dtype=torch.float64)
    memory = torch.randn(2, memory_length, 12, generator=generator, dtype=torch.float64)
    expected = [oracle.attention(config, params, "a", x[5 * i : 5 * i + 5], memory[i]) for i in range(2)]
    actual = module(x, batch_of(x, [5, 5], False), memory)
    assert relative_error(actual, torch.cat(expected)) < TOLERANCE


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("memory_length", [3, 6, 15])
def test_segments_in_a_row(world: int, memory_length: int) -> None:
    """Four segments of six tokens: memory shorter than, equal to and longer than a segment."""
    config = shrunk("moe-transformer-xl-tiny", memory_length=memory_length)
    case = Case(config, world, recompute=memory_length == 3, padded=memory_length == 6)
    result = run_ranks(train_on_segments, world, case, 4, 6)[0]
    expected = train_on_segments_by_oracle(case, tensors(result["initial"]), 4, 6)
    for i, (step, (loss, gradients, memory)) in enumerate(zip(expected, result["segments"], strict=True)):
        assert abs(loss - step.loss) <= TOLERANCE * abs(step.loss), f"segment {i}"
        for name, want in step.gradients.items():
            assert relative_error(gradients[name], want) <= TOLERANCE, f"segment {i}: {name}"
        for mine, theirs in zip(memory, step.outputs[0].memory, strict=True):
            assert relative_error(mine, torch.stack(theirs)) <= TOLERANCE
    # The recurrence is felt: without memory the second segment has another loss.
    forgetful = train_on_segments_by_oracle(case, tensors(result["initial"]), 4, 6, remember=False)
    assert abs(forgetful[1].loss - expected[1].loss) > 1e-6
