"""Seats in a training loop of one's own: sequences go to the ranks whose experts they want, before the model runs.

    seats = luffy.Seats(model)
    ...
    seated = seats.take(input_ids, labels=labels)  # each rank gives what it has read, and gets what sits here
    ...                                            # forward and backward, as many micro-batches as a step has
    optimizer.step()
    seats.step()

Which sequence wants which rank is learnt from the rows that layers count; until the first refresh, after ten steps,
sequences stay where they were read. For any model that holds `luffy.MoEBlock`s, and for what `luffy.hf.parallelize`
returns.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.model.ownership import runtimes_of
from luffy.seats.exchange import Seated, exchange
from luffy.seats.features import features_of
from luffy.seats.seater import LearntSeats
from luffy.seats.sharing import OBSERVE_EVERY, learn_together, load_shared, refreshes_after, shared_state


class Seats:
    """Gives the sequences of all ranks their seats, and learns which are the best. Every rank makes one, and calls
    every method at once with the others.

    model: holds `luffy.MoEBlock`s, or is made by `luffy.hf.parallelize`; its recipe must leave sequences where they
    are between layers. Raises UserError where it does not.
    """

    def __init__(self, model: nn.Module) -> None:
        self.runtimes = runtimes_of(model, "Seats")
        self.comm = self.runtimes[0].comm
        for runtime in self.runtimes:
            if runtime.planner is not None:
                raise UserError(
                    f"Seats: recipe {runtime.recipe.name} moves sequences behind layers, away from their seats; "
                    "take luffy, luffy_max or vanilla_dedup"
                )
        self.seats = LearntSeats(self.comm.mesh.ep_size)
        self._step = 0
        self._taken: Seated | None = None

    def take(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
    ) -> Seated:
        """This rank's batch [B, L], B >= 1 -> the sequences that sit here (luffy.seats.exchange.Seated).

        Once for each micro-batch, before its forward pass. attention_mask: 1 for tokens; None: all are. Raises what
        `luffy.seats.exchange.exchange` raises.
        """
        self._observe()
        seated = exchange(self.comm, self.seats, input_ids, labels, attention_mask, position_ids)
        if self._step % OBSERVE_EVERY == 0 and self.comm.mesh.ep_size > 1:
            self._taken = seated
            for runtime in self.runtimes:
                runtime.observed = []
        return seated

    def step(self) -> None:
        """The end of an optimizer step. After steps 10, 20, 30, 50, 100, ... seats are learnt anew, by two sums over
        ranks. Raises UserError where no layer saw the sequences that `take` gave."""
        self._observe()
        self._step += 1
        if refreshes_after(self._step - 1) and self.comm.mesh.ep_size > 1:
            with self.comm.meter.charging("control"):
                learn_together(self.seats.predictor, self.seats.seen, self.comm)

    def _observe(self) -> None:
        """Add up what layers counted of the sequences that were taken last."""
        seated, self._taken = self._taken, None
        noted = [entry for runtime in self.runtimes for entry in runtime.observed or ()]
        for runtime in self.runtimes:
            runtime.observed = None
        if seated is None or not noted:
            return
        mask = seated.attention_mask.bool()
        lengths = mask.sum(1).cpu().numpy()
        found = [
            rows for layout, counts in noted if (rows := _of_rows(layout, counts, mask.shape[1], lengths)) is not None
        ]
        if not found:
            raise UserError(
                f"Seats: no layer saw the {len(lengths)} sequences that take() gave; feed blocks x [B, S, D] of these"
            )
        ids = np.split(seated.input_ids[mask].cpu().numpy(), np.cumsum(lengths)[:-1])
        self.seats.seen.observe(features_of(ids), lengths, np.sum(found, axis=0))

    def state_dict(self) -> dict[str, Any]:
        """To go on to the bit: plain tensors, the same on every rank. Every rank calls it, between steps."""
        return shared_state(self.seats, self.comm) | {"step": torch.tensor(self._step)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take up what `state_dict` gave. Of another number of ranks, seats are learnt from the beginning."""
        self._step = int(state["step"]) if load_shared(self.seats, state, self.comm) else 0


def _of_rows(layout: Layout, counts: Tensor, longest: int, lengths: np.ndarray) -> np.ndarray | None:
    """Rows [sequences, N] of a layer -> [B, N] of the batch's rows. A packed row may hold several sequences.

    None for a layer that ran on something else, as in an evaluation between.
    """
    own, rows, num = np.asarray(layout.lengths), counts.cpu().numpy(), len(lengths)
    if len(own) == num and (own == longest).all():  # as a tensor [B, L], padding and all
        return rows
    if own.sum() != lengths.sum():
        return None
    row_of = np.searchsorted(np.cumsum(lengths), np.cumsum(own) - own, side="right")
    found = np.zeros((num, rows.shape[1]), dtype=rows.dtype)
    np.add.at(found, row_of, rows)
    return found
