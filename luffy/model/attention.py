"""Self-attention over the sequences of a TokenBatch, packed or padded.

Packed: no padding anywhere. On a GPU in half precision one variable-length flash kernel covers all sequences; in any
other case sequences of equal length are batched together, which wastes nothing and needs no special kernel.
Padded: the projections and the attention run on a [S, max_length] grid, as the paper's testbed did; this is the
layout its cost model describes.

Positions are "learned" (added at the embedding), "rope" (rotary, arXiv 2104.09864) or "relative" (Transformer-XL,
arXiv 1901.02860, equation for A^rel: content and position terms with the learnt biases u and v).
"""

from __future__ import annotations

import inspect
from dataclasses import replace
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn

from luffy.config import ModelConfig
from luffy.data.batch import Layout, TokenBatch
from luffy.model.layers import Linear, make_norm

# The causal flag of varlen_attn became a window between releases.
_VARLEN_TAKES_WINDOW = "window_size" in inspect.signature(varlen_attn).parameters


class Attention(nn.Module):
    """Multi-head self-attention: TokenBatch -> its output rows [T, D], without residual or norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        D, H = config.hidden_size, config.num_heads
        self.num_heads, self.head_size, self.causal = H, config.head_size, config.causal
        self.position, self.rope_base = config.position, config.rope_base
        self.memory_length = config.memory_length
        self.qkv = Linear(D, 3 * D, bias=config.bias)
        self.out = Linear(D, D, bias=config.bias)
        self.q_norm = make_norm(config, config.head_size) if config.qk_norm else None
        self.k_norm = make_norm(config, config.head_size) if config.qk_norm else None
        if config.position == "relative":
            self.relative = Linear(D, D, bias=False)
            self.content_bias = nn.Parameter(torch.zeros(H, config.head_size))
            self.position_bias = nn.Parameter(torch.zeros(H, config.head_size))

    def forward(self, x: Tensor, batch: TokenBatch, memory: Tensor | None = None) -> Tensor:
        """x: [T, D] (normed rows). memory: [S, M, D] of the previous segment (normed likewise) or None."""
        layout = batch.layout
        if layout.num_tokens == 0:
            # An empty rank still touches every parameter, so that gradient synchronisation sees them all.
            q, k, v = self._qkv(x, layout.positions)
            return self.out((q + k + v).flatten(1)) + self._zero_of_unused(x)
        if memory is not None:
            return self._with_memory(x, layout, memory)
        if batch.padded and not layout.equal_lengths:
            return self._padded(x, layout)
        q, k, v = self._qkv(x, layout.positions)  # [T, H, hd]
        return self.out(self._packed(q, k, v, layout).flatten(1))

    def _zero_of_unused(self, x: Tensor) -> Tensor:
        zero = x.new_zeros(())
        if self.position == "relative":
            for p in (self.relative.weight, self.content_bias, self.position_bias):
                zero = zero + p.sum().to(x.dtype) * 0
        return zero

    def _qkv(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        qkv = self.qkv(x).unflatten(-1, (3, self.num_heads, self.head_size))
        q, k, v = qkv.unbind(-3)  # [.., H, hd]
        if self.q_norm is not None and self.k_norm is not None:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.position == "rope":
            q, k = (apply_rope(t, positions, self.rope_base) for t in (q, k))
        return q, k, v

    def _packed(self, q: Tensor, k: Tensor, v: Tensor, layout: Layout) -> Tensor:
        """[T, H, hd] each -> [T, H, hd]; every sequence attends to itself alone."""
        flash = q.is_cuda and q.dtype in (torch.bfloat16, torch.float16) and self.position != "relative"
        if flash:
            n, cu = layout.max_length, layout.cu_seqlens
            causal: dict[str, Any] = {"is_causal": self.causal}
            if _VARLEN_TAKES_WINDOW:
                causal = {"window_size": (-1, 0) if self.causal else (-1, -1)}
            return cast(Tensor, varlen_attn(q, k, v, cu, cu, n, n, **causal))
        if layout.equal_lengths:
            return self._equal(q, k, v, layout.max_length)
        outputs, rows = [], []
        for length, index in layout.groups_of_equal_length:
            outputs.append(self._equal(q[index], k[index], v[index], length))
            rows.append(index)
        # Put the groups back in row order: a permutation, so a plain gather with its inverse.
        return torch.cat(outputs).index_select(0, torch.argsort(torch.cat(rows)))

    def _equal(self, q: Tensor, k: Tensor, v: Tensor, length: int) -> Tensor:
        """Sequences of one length: [n*L, H, hd] -> [n*L, H, hd]."""
        q, k, v = (t.unflatten(0, (-1, length)).transpose(1, 2) for t in (q, k, v))  # [n, H, L, hd]
        return self._attend(q, k, v, None).transpose(1, 2).flatten(0, 1)

    def _padded(self, x: Tensor, layout: Layout) -> Tensor:
        S, L = layout.num_sequences, layout.max_length
        grid = x.new_zeros(S * L, x.shape[1]).index_copy(0, layout.padded_index, x)
        positions = torch.arange(L, device=x.device).repeat(S)
        q, k, v = (t.unflatten(0, (S, L)).transpose(1, 2) for t in self._qkv(grid, positions))
        # Padding stands behind the tokens, so a causal mask already hides it from them.
        mask = None if self.causal else layout.key_mask[:, None, None, :]
        y = self._attend(q, k, v, mask).transpose(1, 2).flatten(2)  # [S, L, D]
        return self.out(y).flatten(0, 1).index_select(0, layout.padded_index)

    def _with_memory(self, x: Tensor, layout: Layout, memory: Tensor) -> Tensor:
        """Segment recurrence: keys and values also cover the M states before the segment; equal lengths only."""
        S, M = memory.shape[:2]
        x = x.unflatten(0, (S, -1))  # [S, L, D]
        context = torch.cat([memory.to(x.dtype), x], dim=1)  # [S, M+L, D]
        # Relative positions need no position ids.
        q, k, v = (t.transpose(1, 2) for t in self._qkv(context, layout.positions))  # [S, H, M+L, hd]
        y = self._attend(q[:, :, M:], k, v, None)
        return self.out(y.transpose(1, 2).flatten(2)).flatten(0, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """q: [n, H, Lq, hd]; k, v: [n, H, Lk, hd] with the queries standing at the last Lq key positions."""
        if self.position != "relative":
            return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        Lq, Lk = q.shape[2], k.shape[2]
        bias = self._relative_bias(q, Lk) * self.head_size**-0.5
        if self.causal:
            future = torch.ones(Lq, Lk, dtype=torch.bool, device=q.device).triu(1 + Lk - Lq)
            bias = bias.masked_fill(future, float("-inf"))
        elif mask is not None:
            bias = bias.masked_fill(~mask, float("-inf"))
        q = q + self.content_bias.to(q.dtype)[:, None]
        return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)

    def _relative_bias(self, q: Tensor, Lk: int) -> Tensor:
        """(q_i + v) . W_r R_{i-j}: [n, H, Lq, Lk]."""
        Lq = q.shape[2]
        # Distances i - j from Lk-1 (the oldest key) down to -(Lq-1) (a later key, seen by encoders only).
        distance = torch.arange(Lk - 1, -Lq, -1, device=q.device)
        r = self.relative(sinusoids(distance, self.num_heads * self.head_size).to(q.dtype))
        r = r.unflatten(-1, (self.num_heads, self.head_size)).transpose(0, 1)  # [H, Lk+Lq-1, hd]
        scores = (q + self.position_bias.to(q.dtype)[:, None]) @ r.transpose(1, 2)  # [n, H, Lq, Lk+Lq-1]
        # Query i (of Lq, at key position Lk-Lq+i) and key j need distance column (Lq-1-i) + j.
        offset = torch.arange(Lq - 1, -1, -1, device=q.device)[:, None] + torch.arange(Lk, device=q.device)
        return scores.gather(-1, offset.expand(*scores.shape[:2], Lq, Lk))


def remember(batch: TokenBatch, hidden: Tensor, memory: Tensor | None, length: int) -> TokenBatch:
    """Keep the last `length` states of this block's input for the next segment, without gradient."""
    S = batch.layout.num_sequences
    states = hidden.detach().unflatten(0, (S, -1)) if S else hidden.detach().new_zeros(0, 0, hidden.shape[1])
    if memory is not None:
        states = torch.cat([memory.to(states.dtype), states], dim=1)
    return replace(batch, new_memory=(*batch.new_memory, states[:, -length:]))


def sinusoids(distance: Tensor, size: int) -> Tensor:
    """Sinusoidal embedding of (signed) distances: [n] -> [n, size], float64-exact frequencies."""
    frequency = 10000.0 ** (-torch.arange(0, size, 2, device=distance.device, dtype=torch.float64) / size)
    angle = distance.to(torch.float64)[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], dim=-1)[:, :size]


def apply_rope(x: Tensor, positions: Tensor, base: float) -> Tensor:
    """Rotate pairs (i, i + hd/2) of [.., T, H, hd] by positions [T]."""
    half = x.shape[-1] // 2
    frequency = base ** (-torch.arange(half, device=x.device, dtype=torch.float64) / half)
    angle = (positions.to(torch.float64)[:, None] * frequency)[:, None, :]  # [T, 1, hd/2]
    wide = torch.promote_types(x.dtype, torch.float32)
    cos, sin = angle.cos().to(wide), angle.sin().to(wide)
    a, b = x.to(wide).split(half, dim=-1)
    return torch.cat([a * cos - b * sin, a * sin + b * cos], dim=-1).to(x.dtype)
