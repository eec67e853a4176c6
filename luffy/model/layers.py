"""Small parts: linear maps that follow the stream's dtype, norms, dense feed-forward, activations.

Parameters are kept in float32 (or float64) while the residual stream may be bfloat16. Each layer casts its own
weights to the stream's dtype where it uses them, so mixed precision is visible in the code, behaves alike on every
device, and needs no autocast state; gradients arrive in the parameters' dtype.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from luffy.config import ModelConfig
from luffy.kernels.activation import activate


class Linear(nn.Linear):
    """`nn.Linear` that computes in its input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return F.linear(x, self.weight.to(x.dtype), bias)


class LayerNorm(nn.LayerNorm):
    """Layer norm with its statistics in float32 at least; output in the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        bias = None if self.bias is None else self.bias.to(wide)
        return F.layer_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), bias, self.eps).to(x.dtype)


class RMSNorm(nn.RMSNorm):
    """Root-mean-square norm (arXiv 1910.07467), statistics in float32 at least; output in the input's dtype.

    One kernel each way on a GPU, which wants its weight in the input's dtype.
    """

    def forward(self, x: Tensor) -> Tensor:
        if x.is_cuda:
            return F.rms_norm(x, self.normalized_shape, self.weight.to(x.dtype), self.eps)
        wide = torch.promote_types(self.weight.dtype, torch.float32)
        return F.rms_norm(x.to(wide), self.normalized_shape, self.weight.to(wide), self.eps).to(x.dtype)


def make_norm(config: ModelConfig, size: int | None = None) -> nn.Module:
    size = size or config.hidden_size
    if config.norm == "rmsnorm":
        return RMSNorm(size, eps=config.norm_eps)
    return LayerNorm(size, eps=config.norm_eps)


class FeedForward(nn.Module):
    """A dense feed-forward network: the blocks without experts, and the experts that all tokens share."""

    def __init__(self, config: ModelConfig, hidden_size: int) -> None:
        super().__init__()
        self.activation = config.activation
        width = 2 * hidden_size if config.activation == "swiglu" else hidden_size
        self.w_in = Linear(config.hidden_size, width, bias=config.bias)
        self.w_out = Linear(hidden_size, config.hidden_size, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.w_out(activate(self.w_in(x), self.activation))
