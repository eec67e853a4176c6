"""The library's attention over the rows of a TokenBatch.

The library wants a grid [sequences, length, D]. Sequences of equal length make one without padding, so packed rows are
attended to group by group; `padded` makes one grid of all, padded on the right, where no token can see the padding: it
lies in its future. Positions, rotary embeddings and masks are functions of the lengths, so they follow a sequence that
moves without being sent. Masks are the library's own, made for its configured attention and window.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import create_causal_mask, create_sliding_window_causal_mask

from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.hf.parts import call_in

# Their frequencies depend on the longest sequence of a batch, so a sequence's output would depend on its company.
UNSTEADY_ROPE = ("dynamic", "longrope")


def check_attention(config: Any) -> None:
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type", "default")
    if rope in UNSTEADY_ROPE:
        raise UserError(
            f"rope_type {rope!r}: its frequencies depend on the longest sequence of the batch, which moves between "
            f"ranks; set another one in the model's configuration"
        )


class Frames:
    """What attention needs besides rows, for one forward pass: rotary embeddings and masks by length."""

    def __init__(self, config: Any, rotary: nn.Module, longest: int, like: Tensor, padded: bool) -> None:
        self.config, self.padded = config, padded
        positions = torch.arange(max(longest, 1), device=like.device)[None]
        self.cos, self.sin = rotary(like, position_ids=positions)  # [1, longest, hd] each
        self._masks: dict[tuple[int, str], Any] = {}

    def attend(self, attention: nn.Module, index: int, x: Tensor, layout: Layout) -> Tensor:
        """x: [T, D], normed -> what attention of layer `index` answers, [T, D]."""
        if layout.num_tokens == 0:
            # A rank without tokens still touches every parameter, so that gradients are summed over all ranks.
            ghost = self._run(attention, index, x.new_zeros(1, 1, x.shape[1]))
            return x + ghost.sum() * 0
        if self.padded and not layout.equal_lengths:
            grid = x.new_zeros(layout.num_sequences * layout.max_length, x.shape[1])
            grid = grid.index_copy(0, layout.padded_index, x).unflatten(0, (layout.num_sequences, layout.max_length))
            return self._run(attention, index, grid).flatten(0, 1)[layout.padded_index]
        groups = layout.groups_of_equal_length
        parts = [self._run(attention, index, x[rows].unflatten(0, (-1, n))).flatten(0, 1) for n, rows in groups]
        if len(parts) == 1:
            rows = groups[0][1]
            return torch.empty_like(x).index_copy(0, rows, parts[0])
        return torch.empty_like(x).index_copy(0, torch.cat([rows for _, rows in groups]), torch.cat(parts))

    def _run(self, attention: nn.Module, index: int, grid: Tensor) -> Tensor:
        """[S, L, D] -> [S, L, D]."""
        length = grid.shape[1]
        answer = call_in(
            grid.dtype,
            attention,
            hidden_states=grid,
            position_embeddings=(self.cos[:, :length], self.sin[:, :length]),
            attention_mask=self._mask(index, grid),
            position_ids=torch.arange(length, device=grid.device)[None],
            past_key_values=None,
        )
        return answer[0]

    def _mask(self, index: int, grid: Tensor) -> Any:
        types = getattr(self.config, "layer_types", None)
        kind = "sliding_attention" if getattr(self.config, "sliding_window", None) is not None else "full_attention"
        kind = kind if types is None else types[index]
        key = (grid.shape[1], kind)
        if key not in self._masks:
            if kind not in ("full_attention", "sliding_attention"):
                raise UserError(f"layer_types {kind!r}: only full_attention and sliding_attention are known here")
            make = create_causal_mask if kind == "full_attention" else create_sliding_window_causal_mask
            self._masks[key] = make(
                config=self.config, inputs_embeds=grid[:1], attention_mask=None, past_key_values=None
            )
        return self._masks[key]
