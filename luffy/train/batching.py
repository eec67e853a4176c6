"""From the loader's sequences to a MicroBatch: what every rank must agree on before the first layer.

One small all-gather tells every rank of the EP group how long each sequence is and how many labels there are; the
sequence table, the positions and the loss normaliser follow from it.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from luffy.comm import Comm
from luffy.data.batch import Layout, SequenceTable
from luffy.data.loader import Sequence as TokenSequence
from luffy.errors import RankMismatchError
from luffy.model.transformer import IGNORE_INDEX, MicroBatch


def gather_step(micro_batches: Sequence[Sequence[TokenSequence]], comm: Comm) -> np.ndarray:
    """Lengths of all sequences of a step on all ranks, int64 [world, micro-batches, 1 + sequences].

    Column 0 holds the number of labels; then one length per sequence. The number of sequences per rank is fixed, so
    the shape is the same everywhere.
    """
    mine = np.array(
        [
            [sum(int((s.labels != IGNORE_INDEX).sum()) for s in micro), *(len(s.tokens) for s in micro)]
            for micro in micro_batches
        ],
        dtype=np.int64,
    )
    gathered = comm.all_gather_world(torch.from_numpy(mine).to(comm.mesh.device))
    return gathered.cpu().numpy()


def make_micro_batch(
    sequences: Sequence[TokenSequence],
    index: int,
    step: np.ndarray,
    comm: Comm,
    *,
    padded: bool = False,
    memory: tuple[torch.Tensor, ...] | None = None,
    topics: np.ndarray | None = None,
    num_topics: int = 0,
    seat_strength: float = 1.0,
) -> MicroBatch:
    """Micro-batch `index` of the step that `gather_step` described.

    topics: of its sequences on all ranks, int64 [world, sequences], below num_topics. seat_strength: see MicroBatch.

    Raises RankMismatchError if this rank's sequences are not those it announced.
    """
    mesh = comm.mesh
    first = mesh.dp_rank * mesh.ep_size
    lengths = step[first : first + mesh.ep_size, index, 1:]  # [ep_size, sequences per rank]
    home = np.repeat(np.arange(mesh.ep_size), lengths.shape[1])
    here = None if topics is None else topics[first : first + mesh.ep_size].reshape(-1)
    table = SequenceTable(lengths.reshape(-1), home, here, num_topics)
    layout = Layout(table, mesh.ep_rank, mesh.device)
    if layout.lengths != tuple(len(s.tokens) for s in sequences):
        raise RankMismatchError(f"rank {mesh.rank}: the sequences differ from those announced for this step")
    device = mesh.device

    def flat(arrays: list[np.ndarray]) -> torch.Tensor:
        joined = np.concatenate(arrays) if arrays else np.zeros(0, dtype=np.int64)
        return torch.from_numpy(joined.astype(np.int64)).to(device, non_blocking=True)

    return MicroBatch(
        tokens=flat([s.tokens for s in sequences]),
        labels=flat([s.labels for s in sequences]),
        layout=layout,
        num_tokens=int(step[:, index, 1:].sum()),
        step_tokens=int(step[:, :, 1:].sum()),
        step_labels=int(step[:, :, 0].sum()),
        padded=padded,
        memory=memory,
        seat_strength=seat_strength,
    )
