"""From a step's sequences to MicroBatches: what every rank must agree on before the first layer.

A `StepTable` says how long each sequence of an optimizer step is, where it sits and how many labels there are; layouts,
positions and the loss normaliser follow from it. Where each rank reads its own share the table is gathered
(`gather_step`). Where every rank reads all and seats decide, each makes it by itself (luffy.train.seating).
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luffy.comm import Comm
from luffy.data.batch import Layout, SequenceTable
from luffy.data.loader import Sequence as TokenSequence
from luffy.errors import RankMismatchError
from luffy.model.stack import IGNORE_INDEX, MicroBatch


@dataclass(frozen=True, eq=False)
class StepTable:
    """lengths[m][r]: tokens of the sequences of world rank r in micro-batch m, int64. num_labels: of the whole step.

    topics[m][r]: what each of them is about, int64 below num_topics; None where nobody asks.
    """

    lengths: Sequence[Sequence[np.ndarray]]
    num_labels: int
    topics: Sequence[Sequence[np.ndarray]] | None = None
    num_topics: int = 0

    def num_tokens_of(self, micro_batch: int) -> int:
        """On all ranks."""
        return sum(int(n.sum()) for n in self.lengths[micro_batch])

    @property
    def num_tokens(self) -> int:
        return sum(self.num_tokens_of(m) for m in range(len(self.lengths)))

    def digest(self) -> int:
        """62 bits that differ where tables do, for ranks to compare."""
        h = hashlib.blake2b(str(self.num_labels).encode(), digest_size=8)
        for table in (self.lengths, self.topics or ()):
            for ranks in table:
                for own in ranks:
                    h.update(np.int64(len(own)).tobytes() + own.astype(np.int64).tobytes())
        return int.from_bytes(h.digest(), "little") >> 2


def count_labels(sequences: Sequence[TokenSequence]) -> int:
    """Places that are trained on."""
    return sum(int((s.labels != IGNORE_INDEX).sum()) for s in sequences)


def gather_step(micro_batches: Sequence[Sequence[TokenSequence]], comm: Comm, num_topics: int = 0) -> StepTable:
    """The table of a step of which each rank has read its own sequences, equally many on each: one small all-gather.

    num_topics: where sequences have topics, which are gathered as well.
    """
    rows = [[count_labels(micro), *(len(s.tokens) for s in micro)] for micro in micro_batches]
    if num_topics:
        rows = [[*row, *(int(s.topic or 0) for s in micro)] for row, micro in zip(rows, micro_batches, strict=True)]
    mine = torch.from_numpy(np.array(rows, dtype=np.int64)).to(comm.mesh.device)
    gathered = comm.all_gather_world(mine).cpu().numpy()
    labels, *parts = np.split(gathered, [1, 1 + len(micro_batches[0])], axis=2)
    lengths, topics = ([list(part[:, m]) for m in range(len(rows))] for part in parts)
    return StepTable(lengths, int(labels.sum()), topics if num_topics else None, num_topics)


def make_micro_batch(
    sequences: Sequence[TokenSequence],
    index: int,
    step: StepTable,
    comm: Comm,
    *,
    padded: bool = False,
    memory: tuple[torch.Tensor, ...] | None = None,
    seat_strength: float = 1.0,
) -> MicroBatch:
    """Micro-batch `index` of the step that `step` describes. seat_strength: see MicroBatch.

    Raises RankMismatchError if this rank's sequences are not those that the table says it has.
    """
    mesh = comm.mesh
    first = mesh.dp_rank * mesh.ep_size
    of_group = step.lengths[index][first : first + mesh.ep_size]
    home = np.repeat(np.arange(mesh.ep_size), [len(n) for n in of_group])
    topics = None if step.topics is None else np.concatenate(step.topics[index][first : first + mesh.ep_size])
    table = SequenceTable(np.concatenate(of_group), home, topics, step.num_topics)
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
        num_tokens=step.num_tokens_of(index),
        step_tokens=step.num_tokens,
        step_labels=step.num_labels,
        padded=padded,
        memory=memory,
        seat_strength=seat_strength,
    )
