"""The recorder: what routers chose in one micro-batch, put together from all ranks of an EP group.

Layers call `note` on their way; it keeps references to tensors that exist anyway. Only `finish`, once for a whole
micro-batch, sends something: the choices of all layers, in the order of the sequence table, to every rank of the group.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.data.batch import Layout
from luffy.plan.trace import TraceStep
from luffy.seats.features import DIM, sequence_features


class Recorder:
    """Set `active` on every rank before a forward pass, and call `finish` after it."""

    def __init__(self) -> None:
        self.active = False
        self._noted: list[tuple[Layout, Tensor, Tensor | None]] = []

    def note(self, layout: Layout, topk_expert_ids: Tensor, foreseen: Tensor | None) -> None:
        """One layer's choices [T, K], and those that the next layer's router made of this layer's stream."""
        self._noted.append((layout, topk_expert_ids, foreseen))

    def finish(self, comm: Comm, step: int, tokens: Tensor | None = None) -> TraceStep:
        """The micro-batch as a TraceStep, on every rank of the EP group. Stops recording.

        tokens: ids of this rank's tokens, [T], as they went into the embedding; None, on all ranks alike, leaves the
        trace without features.
        """
        noted, self._noted, self.active = self._noted, [], False
        table = noted[0][0].table
        columns = [(layout, ids) for layout, ids, _ in noted]
        columns += [(layout, ids) for layout, _, ids in noted[:-1] if ids is not None]
        T, K = table.num_tokens, noted[0][1].shape[1]
        everything = torch.zeros(len(columns), T, K, dtype=torch.int32, device=noted[0][1].device)
        for i, (layout, ids) in enumerate(columns):
            # Each token is on one rank; ids are shifted so that 0 means "not mine" and the sum puts all in place.
            everything[i, layout.global_token] = ids.to(torch.int32) + 1
        ids_of_all = (comm.all_reduce_ep(everything) - 1).to(torch.int16).cpu().numpy()
        chosen, foreseen = np.split(ids_of_all, [len(noted)])
        features = None if tokens is None else self._features(noted[0][0], tokens, comm)
        return TraceStep(step, table.lengths.copy(), table.home_rank.copy(), chosen, foreseen, features)

    @staticmethod
    def _features(layout: Layout, tokens: Tensor, comm: Comm) -> np.ndarray:
        """int16 [S, DIM] of all sequences of the table; `layout`: how this rank's lie in `tokens`."""
        of_all = torch.zeros(len(layout.table.lengths), DIM, dtype=torch.int32)
        mine = sequence_features(tokens.cpu().numpy(), layout.table.lengths[layout.sequences])
        of_all[torch.from_numpy(layout.sequences)] = torch.from_numpy(mine).to(torch.int32)
        summed = comm.all_reduce_ep(of_all.to(layout.device))
        return summed.to(torch.int16).cpu().numpy()
