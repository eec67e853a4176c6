"""A parallel model as other programs call a causal language model: padded rows in, loss and logits out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutput

from luffy.errors import UserError
from luffy.hf.adapters import save_adapter
from luffy.hf.batches import spans
from luffy.hf.model import ParallelModel
from luffy.hf.saving import save_pretrained
from luffy.model.transformer import IGNORE_INDEX
from luffy.train.gradients import GradientSync
from luffy.train.own_seats import Seats


class CausalLM(nn.Module):
    """`forward(input_ids, attention_mask, labels, position_ids)` of a ParallelModel; every rank calls it at once.

    The loss is this rank's share: summed over ranks, it is the mean over all labels, and so are gradients summed.
    With a recipe that learns seats, rows that train go to the ranks whose experts they want; `seats.step()` ends a
    step.
    """

    # What transformers.Trainer looks at: count the labels of all micro-batches and ranks, those that are predicted.
    accepts_loss_kwargs, loss_type, main_input_name = True, "ForCausalLM", "input_ids"

    def __init__(self, parallel: ParallelModel) -> None:
        super().__init__()
        self.parallel = parallel
        self.sync = GradientSync(parallel, parallel.runtime.comm)
        learns = parallel.runtime.recipe.seats == "learnt" and parallel.runtime.comm.mesh.world_size > 1
        self.seats = Seats(parallel) if learns else None
        self._last = True

    @property
    def config(self) -> Any:
        return self.parallel.causal_lm.config

    @property
    def generation_config(self) -> Any:
        return self.parallel.causal_lm.generation_config

    @property
    def device(self) -> torch.device:
        return self.parallel.runtime.comm.mesh.device

    @property
    def is_peft(self) -> bool:
        return hasattr(self.parallel.library, "peft_config")

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        *,
        num_items_in_batch: Tensor | int | None = None,
        micro_batches: int = 1,
        return_logits: bool | None = None,
        **others: Any,
    ) -> CausalLMOutput:
        """[B, L] each -> loss [] if there are labels; logits [B, L, V], no gradient, if asked or if there are none.

        num_items_in_batch: labels of the whole step on all ranks, None: of this call. micro_batches: calls of the step.
        """
        odd = [name for name, value in others.items() if value is not None and name not in _OF_NO_CONCERN]
        if odd:
            raise UserError(f"{odd[0]}: a model whose experts are spread over ranks takes {', '.join(_TAKEN)}")
        trains = labels is not None and self.training and torch.is_grad_enabled()
        loss = logits = None
        if trains and self.seats is not None and not return_logits:
            at = self.seats.take(input_ids, labels, attention_mask, position_ids)
            batch = self.parallel.batch(at.input_ids, at.attention_mask, at.labels, at.position_ids)
        else:
            batch = self.parallel.batch(input_ids, attention_mask, labels, position_ids)
        if trains:
            step_labels = batch.step_labels if num_items_in_batch is None else int(num_items_in_batch)
            batch = replace(batch, step_labels=step_labels, step_tokens=batch.num_tokens * micro_batches)
            loss = self.sync(batch, last=self._last).loss
        elif labels is not None:
            with torch.no_grad():
                loss = self.parallel(batch).token_loss
        if return_logits or (return_logits is None and labels is None):
            rows = self.parallel.logits(batch)
            logits = rows.new_zeros(*input_ids.shape, rows.shape[-1])
            begin = 0
            for row, first, end in spans(input_ids, attention_mask, position_ids):
                logits[row, first:end] = rows[begin : begin + end - first]
                begin += end - first
        return CausalLMOutput(loss=loss, logits=logits)

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """As DistributedDataParallel's: around all micro-batches of a step but the last."""
        self._last = False
        try:
            yield
        finally:
            self._last = True

    def get_output_embeddings(self) -> nn.Module:
        return self.parallel.causal_lm.get_output_embeddings()

    def get_input_embeddings(self) -> nn.Module:
        return self.parallel.causal_lm.get_input_embeddings()

    def add_model_tags(self, tags: Any) -> None:
        self.parallel.causal_lm.add_model_tags(tags)

    def activation_checkpointing_enable(self, **_: Any) -> None:
        """Attention and experts are computed again in the backward pass; nothing is sent again."""
        object.__setattr__(self.parallel.runtime, "recompute", True)  # frozen for everyone else

    gradient_checkpointing_enable = activation_checkpointing_enable

    def save_pretrained(self, folder: Path | str, **_: Any) -> None:
        """A folder that plain transformers opens, or of an adapter, that PEFT opens; every rank calls it."""
        if self.is_peft:
            save_adapter(self.parallel, folder)
        else:
            save_pretrained(self.parallel, folder)


_TAKEN = ("input_ids", "attention_mask", "labels", "position_ids")
_OF_NO_CONCERN = {"use_cache", "output_router_logits", "fused_lm_head", "return_dict", "num_logits_to_keep"}


def without(labels: Tensor, kept: int) -> Tensor:
    """Labels [B, L] of the first `kept` rows; the others' are left out of the loss."""
    labels = labels.clone()
    labels[max(kept, 0) :] = IGNORE_INDEX
    return labels
