"""Batches as the library's users have them, made into a MicroBatch: padded on either side, or packed.

`labels` are the library's: one for each token, -100 where none, and a token is trained to predict the label of the
*next* place. Here they are shifted within each sequence, so that no sequence predicts the first token of another.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.data.batch import Layout, SequenceTable
from luffy.errors import UserError
from luffy.model.transformer import IGNORE_INDEX, MicroBatch


def make_batch(
    comm: Comm,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    padded: bool = False,
) -> MicroBatch:
    """[B, L] on this rank -> its part of a micro-batch of all ranks. Every rank calls it, with as many rows as it has.

    attention_mask: 1 for tokens, which must be neighbours (padding left or right, or both). position_ids: of a packed
    row: a sequence begins wherever it is 0. Their values are not used beyond that: positions count from each
    sequence's first token.
    """
    found = spans(input_ids, attention_mask, position_ids)
    pieces = [input_ids[b, i:j] for b, i, j in found]
    targets = [_shifted(None if labels is None else labels[b, i:j], j - i) for b, i, j in found]
    mesh = comm.mesh
    mine = torch.tensor([len(found), sum(int((y != IGNORE_INDEX).sum()) for y in targets)], device=mesh.device)
    counts = comm.all_gather_world(mine).cpu().numpy()  # [world, 2]
    most = max(1, int(counts[:, 0].max()))
    lengths = torch.zeros(most, dtype=torch.int64)
    lengths[: len(found)] = torch.tensor([j - i for _, i, j in found], dtype=torch.int64)
    gathered = comm.all_gather_world(lengths.to(mesh.device)).cpu().numpy()  # [world, most]
    ranks = mesh.ep_ranks
    own = [gathered[r, : counts[r, 0]] for r in ranks]
    table = SequenceTable(np.concatenate(own), np.repeat(np.arange(mesh.ep_size), counts[ranks, 0]))
    nothing = input_ids.new_zeros(0)
    num_tokens = int(gathered.sum())
    return MicroBatch(
        tokens=torch.cat([nothing, *pieces]).to(mesh.device),
        labels=torch.cat([nothing, *targets]).to(mesh.device),
        layout=Layout(table, mesh.ep_rank, mesh.device),
        num_tokens=num_tokens,
        step_tokens=num_tokens,
        step_labels=int(counts[:, 1].sum()),
        padded=padded,
    )


def _shifted(labels: Tensor | None, length: int) -> Tensor:
    out = torch.full((length,), IGNORE_INDEX, dtype=torch.int64)
    if labels is not None:
        out[:-1] = labels[1:].cpu()
        return out.to(labels.device)
    return out


def spans(ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[tuple[int, int, int]]:
    """(row, begin, end) of each sequence; rows without a token have none."""
    if ids.dim() != 2:
        raise UserError(f"input_ids must be [batch, length], not {list(ids.shape)}")
    keep = np.ones(ids.shape, dtype=bool) if mask is None else mask.cpu().numpy().astype(bool)
    if keep.shape != tuple(ids.shape):
        raise UserError(f"attention_mask {list(keep.shape)} does not fit input_ids {list(ids.shape)}")
    starts_at = None if positions is None else np.broadcast_to(positions.cpu().numpy(), keep.shape)
    out = []
    for row in range(keep.shape[0]):
        places = np.flatnonzero(keep[row])
        if len(places) == 0:
            continue
        begin, end = int(places[0]), int(places[-1]) + 1
        if end - begin != len(places):
            raise UserError(f"attention_mask: the tokens of row {row} are not neighbours; pad on the left or the right")
        cuts = [begin]
        if starts_at is not None:
            cuts += [int(p) for p in begin + 1 + np.flatnonzero(starts_at[row, begin + 1 : end] == 0)]
        out += [(row, i, j) for i, j in zip(cuts, [*cuts[1:], end], strict=True)]
    return out
