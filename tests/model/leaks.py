"""The probe for leaks: change a token, and look at every token's last state."""

from __future__ import annotations

import numpy as np
import torch

from luffy.comm import Comm
from luffy.data.batch import TokenBatch
from luffy.data.loader import Sequence
from luffy.model import ModelOutput, Transformer
from luffy.testing import random_sequences
from luffy.train.batching import make_micro_batch
from luffy.train.seating import table_of

from .cases import Case, build, watch_block
from .placing import Trial, place

LENGTH = 12


def _sequences(case: Case, change: tuple[int, int] | None) -> list[Sequence]:
    """The case's sequences, one token changed at (sequence, place); None: none."""
    sequences = random_sequences(case.batch, case.config.vocab_size, seed=11, lengths="equal", longest=LENGTH)
    if change is not None:
        sequence, where = change
        tokens = sequences[sequence].tokens
        tokens[where] = (tokens[where] + 41) % case.config.vocab_size
    return sequences


def _watched(case: Case) -> tuple[Transformer, Comm, list[TokenBatch]]:
    """A case's model, its links, and a list to which each forward pass adds what left the last block."""
    model, comm = build(case)
    last: list[TokenBatch] = []
    watch_block(model.blocks[-1], lambda _, after: last.append(after))
    return model, comm, last


def states_and_outputs(case: Case, changes: list[tuple[int, int] | None]) -> list[tuple[np.ndarray, ModelOutput]]:
    """For each (sequence, place) whose token changes (None: none): the last states, [sequences, LENGTH, D], and what
    the model put out.

    Logits are a function of a token's own last state. Sequences may have moved, so states go by global token id.
    """
    model, comm, last = _watched(case)
    results = []
    for change in changes:
        sequences = _sequences(case, change)
        home = tuple(i % comm.mesh.world_size for i in range(case.batch))
        last.clear()
        out = model(place(Trial(sequences, home, padded=case.padded), comm))
        states = torch.zeros(case.batch * LENGTH, case.config.hidden_size, dtype=torch.float64)
        states[last[0].layout.global_token] = last[0].hidden.detach()
        results.append((comm.all_reduce(states).unflatten(0, (-1, LENGTH)).numpy(), out))
    return results


@torch.no_grad()
def seated_states(case: Case, changes: list[tuple[int, int] | None]) -> list[np.ndarray]:
    """The last states [sequences, LENGTH, D] in reading order, for each change, where sequences take seats anew."""
    model, comm, last = _watched(case)
    results = []
    for change in changes:
        batch, seating = case.seat([_sequences(case, change)])
        own = seating.of(comm.mesh.rank, 0)
        last.clear()
        model(make_micro_batch([batch[i] for i in own], 0, table_of(batch, seating, case.seat_layout), comm))
        states = torch.zeros(case.batch, LENGTH, case.config.hidden_size, dtype=torch.float64)
        states[torch.from_numpy(own)] = last[0].hidden.detach().unflatten(0, (-1, LENGTH))
        results.append(comm.all_reduce(states).numpy())
    return results
