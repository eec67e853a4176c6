"""Latent rows: tokens are projected down before they are dispatched, and what experts answer is projected up at home.

What travels, and what experts see, is A norm(h) of `latent_size` elements, both ways; rows shrink by latent_size /
hidden_size, and so do the experts, of which there may be more for the same cost (LatentMoE, arXiv 2601.18089). The
layer adds B sum_k g_k E_k(A norm(h)) to the stream. The router and shared experts see the whole row.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor, nn

from luffy.data.batch import TokenBatch
from luffy.exchange.copies import Copies
from luffy.exchange.dispatcher import Tokens
from luffy.kernels.rows import gather_rows
from luffy.model.layers import Linear


class LatentRows(nn.Module):
    """The two projections of one MoE layer, whole on every rank."""

    def __init__(self, hidden_size: int, latent_size: int) -> None:
        super().__init__()
        self.enter = Linear(hidden_size, latent_size, bias=False)
        self.out = Linear(latent_size, hidden_size, bias=False)
        self.no_norm = nn.Identity()

    def narrowed(self, tokens: Tokens) -> Tokens:
        """The tokens as they are dispatched: latent rows are sent, and answers are added to zeros."""
        rows = self.enter(tokens.normed)

        def sent(copies: Copies) -> Tensor:
            return gather_rows(rows, copies.token, copies.place)

        def base(rows: Tensor, normed: Tensor | None = None) -> Tensor:
            return rows

        batch = tokens.batch.with_hidden(torch.zeros_like(rows))
        return replace(tokens, batch=batch, normed=rows, rows=sent, norm=self.no_norm, base=base)

    def widened(self, tokens: Tokens, after: TokenBatch) -> TokenBatch:
        """The stream after the layer, from the sums of answers [T, latent_size]."""
        return after.with_hidden(tokens.base(tokens.hidden, tokens.normed) + self.out(after.hidden))
