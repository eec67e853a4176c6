"""The library's attention over the rows of a TokenBatch.

Packed: the library's module sees all rows as one long sequence, so that its projections and norms run once; in the
place of its attention function stands `packed_attention`, which calls that function for sequences of equal length
together and needs no padding. `padded`: one grid of all sequences, padded on the right, where no token can see the
padding: it lies in its future. Positions, rotary embeddings and masks are functions of the lengths, so they follow a
sequence that moves without being sent. Masks are the library's own, made for its configured attention and window.
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.masking_utils import (
    create_causal_mask,
    create_chunked_causal_mask,
    create_sliding_window_causal_mask,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.model.library import call_in


def check_attention(config: Any) -> None:
    """UserError for attention whose answer to a sequence would depend on its company, or that has another mask."""
    if (rope := _rope(config).get("rope_type")) == "dynamic":
        raise UserError(
            f"rope_type {rope!r}: its frequencies depend on the longest sequence of the batch, which moves between "
            f"ranks; set another one in the model's configuration"
        )
    if config.model_type == "minimax" and config.sliding_window is not None:
        raise UserError("sliding_window of minimax, whose layers say full_attention: set it to None")


def _rope(config: Any) -> dict[str, Any]:
    return getattr(config, "rope_parameters", None) or {}


def longest_sequence(config: Any) -> int:
    """Tokens that attention can take. `longrope` has other frequencies where a batch's longest sequence is longer than
    those that the model was first made for; up to there they are the same for all."""
    limit = int(config.max_position_embeddings)
    if _rope(config).get("rope_type") != "longrope":
        return limit
    first = _rope(config).get("original_max_position_embeddings") or getattr(
        config, "original_max_position_embeddings", None
    )
    return min(limit, int(first or limit))


def mixer_of(layer: Any) -> nn.Module:
    """What mixes the tokens of a sequence in a decoder layer: attention, or a recurrence in its place."""
    mixer: nn.Module = layer.self_attn if hasattr(layer, "self_attn") else layer.linear_attn
    return mixer


@functools.cache
def _positions_in(kind: Any) -> bool:
    return "position_embeddings" in inspect.signature(kind.forward).parameters


def takes_positions(mixer: nn.Module) -> bool:
    """Whether it wants rotary embeddings and a mask, as attention does."""
    kind: Any = type(mixer)
    return _positions_in(kind)


def counts_rows(mixer: Any) -> bool:
    """Whether it must see each sequence alone: a recurrence, or attention that takes a row's number for its place.

    A recurrence needs no mask where padding lies on the right. Llama-4 scales queries by their place in the grid.
    """
    if not takes_positions(mixer) or getattr(mixer, "layer_type", None) == "linear_attention":
        return True
    return bool(getattr(mixer, "attn_temperature_tuning", False)) and not mixer.use_rope


PACKED = "luffy_packed"
_MASKS: dict[str, Callable[..., Any]] = {
    "full_attention": create_causal_mask,
    "sliding_attention": create_sliding_window_causal_mask,
    "chunked_attention": create_chunked_causal_mask,
}
# The argument had another name before transformers 5.24.
_NO_CACHE = {"cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values": None}


class Frames:
    """What attention needs besides rows, for one forward pass: rotary embeddings and masks by length."""

    def __init__(self, config: Any, rotary: nn.Module, longest: int, like: Tensor, padded: bool) -> None:
        self.config, self.padded = config, padded
        if _rope(config).get("rope_type") == "longrope" and longest > longest_sequence(config):
            raise UserError(
                f"--sequence-length: a sequence of {longest} tokens; with rope_type 'longrope' {config.model_type} is "
                f"trained on up to {longest_sequence(config)}, beyond which frequencies depend on the batch"
            )
        positions = torch.arange(max(longest, 1), device=like.device)[None]
        # [1, longest, hd] each: cosines and sines, or Llama-4's complex numbers.
        rotated = rotary(like, position_ids=positions)
        self.rotary: tuple[Tensor, ...] = rotated if isinstance(rotated, tuple) else (rotated,)
        self._masks: dict[tuple[int, str], Any] = {}

    def _at(self, positions: Tensor | slice) -> Any:
        chosen = tuple(t[:, positions] for t in self.rotary)
        return chosen if len(chosen) > 1 else chosen[0]

    def attend(self, attention: nn.Module, index: int, x: Tensor, layout: Layout) -> Tensor:
        """x: [T, D], normed -> what attention of layer `index` answers, [T, D]."""
        if layout.num_tokens == 0:
            # A rank without tokens still touches every parameter, so that gradients are summed over all ranks.
            ghost = self._on_grid(attention, index, x.new_zeros(1, 1, x.shape[1]))
            return x + ghost.sum() * 0
        if counts_rows(attention) and not layout.equal_lengths:
            return self._by_length(attention, index, x, layout)
        if self.padded or layout.equal_lengths:
            shape = layout.num_sequences, layout.max_length
            if layout.equal_lengths:
                return self._on_grid(attention, index, x.unflatten(0, shape)).flatten(0, 1)
            grid = x.new_zeros(shape[0] * shape[1], x.shape[1]).index_copy(0, layout.padded_index, x)
            answers = self._on_grid(attention, index, grid.unflatten(0, shape)).flatten(0, 1)
            return answers.index_select(0, layout.padded_index)
        positions, name = layout.positions, self.config._attn_implementation
        masks = {n: self.mask(index, n, x) for n in set(layout.lengths)}
        packed = Packed(layout, masks, ALL_ATTENTION_FUNCTIONS.get_interface(name, _own_function(attention)))
        self.config._attn_implementation = PACKED
        try:
            answer = call_in(
                x.dtype,
                attention,
                hidden_states=x[None],
                position_embeddings=self._at(positions),
                attention_mask=None,
                packed=packed,
            )
        finally:
            self.config._attn_implementation = name
        return answer[0][0]

    def _by_length(self, attention: nn.Module, index: int, x: Tensor, layout: Layout) -> Tensor:
        """Of a recurrence, which has no attention function to stand in for: sequences of one length at a time."""
        out = torch.empty_like(x)
        for length, rows in layout.groups_of_equal_length:
            answers = self._on_grid(attention, index, x.index_select(0, rows).unflatten(0, (-1, length)))
            out = out.index_copy(0, rows, answers.flatten(0, 1))
        return out

    def _on_grid(self, attention: nn.Module, index: int, grid: Tensor) -> Tensor:
        """[S, L, D] -> [S, L, D]."""
        length = grid.shape[1]
        if not takes_positions(attention):
            answer = call_in(grid.dtype, attention, hidden_states=grid)
            return answer[0] if isinstance(answer, tuple) else answer
        answer = call_in(
            grid.dtype,
            attention,
            hidden_states=grid,
            position_embeddings=self._at(slice(length)),
            attention_mask=self.mask(index, length, grid),
        )
        return answer[0]

    def mask(self, index: int, length: int, like: Tensor) -> Any:
        """The library's causal mask of layer `index` for sequences of `length`; None where it needs none."""
        types = getattr(self.config, "layer_types", None)
        kind = "sliding_attention" if getattr(self.config, "sliding_window", None) is not None else "full_attention"
        kind = kind if types is None else types[index]
        if kind == "linear_attention":
            return None
        if (length, kind) not in self._masks:
            if kind not in _MASKS:
                raise UserError(f"layer_types {kind!r}: only {', '.join(_MASKS)} are known here")
            make = _MASKS[kind]
            shaped = like.new_empty(1, length, 1)  # only its shape, dtype and device are looked at
            self._masks[length, kind] = make(config=self.config, inputs_embeds=shaped, attention_mask=None, **_NO_CACHE)
        return self._masks[length, kind]


@dataclass(frozen=True)
class Packed:
    """How packed rows are attended to. masks: by length. function: the library's, as configured."""

    layout: Layout
    masks: dict[int, Any]
    function: Callable[..., tuple[Tensor, Any]]


def packed_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    packed: Packed,
    **options: Any,
) -> tuple[Tensor, None]:
    """[1, H, T, hd] each -> [1, T, H, hd]: every sequence attends to itself alone."""
    out = None
    for length, rows in packed.layout.groups_of_equal_length:
        q, k, v = (t[0][:, rows].unflatten(1, (-1, length)).transpose(0, 1) for t in (query, key, value))
        answer = packed.function(module, q, k, v, packed.masks[length], **options)[0].flatten(
            0, 1
        )  # [n * length, H, hd]
        out = answer.new_empty(query.shape[2], *answer.shape[1:]) if out is None else out
        out = out.index_copy(0, rows, answer)
    assert out is not None, "a rank without tokens does not come here"
    return out[None], None


def _own_function(attention: nn.Module) -> Callable[..., Any]:
    """What the module's file calls eager attention, which the library's table of functions does not hold."""
    there = vars(sys.modules[type(attention).__module__])
    return there.get("eager_attention_forward", ALL_ATTENTION_FUNCTIONS["sdpa"])


ALL_ATTENTION_FUNCTIONS.register(PACKED, packed_attention)
