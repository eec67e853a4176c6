"""Seats around torchtitan's data loader: each batch is exchanged within the expert-parallel group before the model.

Every rank reads its own rows of the data, as before. Before a batch is handed over, its rows (with all documents packed
in one) go to the rank that holds most of the experts that they are predicted to choose (luffy.seats.exchange). Token
ids, labels and positions travel, twelve bytes a token. As many rows arrive as left, so shapes stay as they are; and
torchtitan divides the loss by the labels of all ranks, so the gradient stays that of the same rows.

The predictor learns from what the routers chose, which the dispatchers note at no cost to the device.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from luffy.comm.lent import program_size
from luffy.errors import UserError
from luffy.seats.exchange import exchange
from luffy.seats.features import features_of
from luffy.seats.seater import LearntSeats
from luffy.seats.sharing import learn_together
from luffy.titan.dispatch import SharedRuntime, runtimes

try:
    from torchtitan.components.dataloader import BaseDataLoader

    LOADS_ROWS = True
except ImportError:  # torchtitan after 0.3.0, whose batches are tokens in a row
    from torchtitan.components.data.loader import BaseDataLoader

    LOADS_ROWS = False

_KNOWN = {"input", "positions"}
Batch = tuple[dict[str, Tensor], Tensor]


class SeatedDataLoader(BaseDataLoader):
    """Another loader's batches, each row at its seat. moved_share: of the last batch, what sits elsewhere than read."""

    @dataclass(kw_only=True, slots=True)
    class Config(BaseDataLoader.Config):
        """inner: the loader that reads. refresh: batches between refreshes of the predictor."""

        inner: BaseDataLoader.Config
        refresh: int = 8

    def __init__(self, config: Config, *, dp_world_size: int, dp_rank: int, **more: Any) -> None:
        self.inner = config.inner.build(dp_world_size=dp_world_size, dp_rank=dp_rank, **more)
        self.refresh, self.moved_share = config.refresh, 0.0
        self._key, self._dp_world_size = f"luffy_seats_{dp_rank}", dp_world_size
        self._seats: LearntSeats | None = None
        self._state: dict[str, Tensor] = {}
        self._given: deque[list[np.ndarray]] = deque()  # token ids of batches whose rows are not yet known
        self._since = 0

    def __iter__(self) -> Iterator[Batch]:
        runtime = self._runtime()
        runtime.observed = []
        for inputs, labels in self.inner:
            self._learn(runtime)
            yield self._seated(runtime, inputs, labels)

    def _runtime(self) -> SharedRuntime:
        """That of this process's model. Raises UserError where batches cannot be exchanged within its group."""
        if self._dp_world_size != program_size():
            raise UserError(
                "luffy.titan.seats exchanges the batches of data-parallel ranks, and here ranks share a batch: leave "
                "it out, or set tensor, context and pipeline parallel degrees to 1"
            )
        found = runtimes()
        if len(found) != 1:
            raise UserError(
                f"luffy.titan.seats needs one model with luffy.titan.exchange and --parallelism.expert_parallel_degree "
                f"above 1, and this process has {len(found)}"
            )
        if self._seats is None:
            self._seats = LearntSeats(found[0].comm.mesh.ep_size)
            self._seats.load(self._state)
        return found[0]

    def _seated(self, runtime: SharedRuntime, inputs: dict[str, Tensor], labels: Tensor) -> Batch:
        assert self._seats is not None
        if unknown := sorted(set(inputs) - _KNOWN):
            raise UserError(f"luffy.titan.seats: batches hold {unknown[0]!r}, which it does not know how to move")
        ids, positions = inputs["input"], inputs.get("positions")
        seated = exchange(runtime.comm, self._seats, ids, labels=labels, position_ids=positions)
        runtime.num_sequences, self.moved_share = len(seated.input_ids), seated.moved_share
        self._given.append(list(seated.input_ids.cpu().numpy()))
        out = {"input": seated.input_ids.to(ids.dtype)}
        if positions is not None:
            assert seated.position_ids is not None
            out["positions"] = seated.position_ids.to(positions.dtype)
        assert seated.labels is not None
        return out, seated.labels.to(labels.dtype)

    def _learn(self, runtime: SharedRuntime) -> None:
        """Take in what was observed of the batches that were given, and refresh the predictor when it is time."""
        assert self._seats is not None and runtime.observed is not None
        layers = len(runtime.transports)
        while len(runtime.observed) >= layers and self._given:
            rows = torch.stack([rows for _, rows in runtime.observed[:layers]]).sum(0).cpu().numpy()
            del runtime.observed[:layers]
            ids = self._given.popleft()
            lengths = np.array([len(row) for row in ids], dtype=np.int64)
            self._seats.seen.observe(features_of(ids), lengths, rows)
        self._since += 1
        if self._since > self.refresh:
            self._since = 0
            learn_together(self._seats.predictor, self._seats.seen, runtime.comm)

    def state_dict(self) -> dict[str, Any]:
        """The inner loader's, and the predictor's."""
        state = self._state if self._seats is None else self._seats.state()
        return {**self.inner.state_dict(), self._key: pickle.dumps({k: v.numpy() for k, v in state.items()})}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Of this loader, or of the inner one before seats were turned on."""
        rest = dict(state_dict)
        if (kept := rest.pop(self._key, None)) is not None:
            self._state = {k: torch.from_numpy(v) for k, v in pickle.loads(kept).items()}
            if self._seats is not None:
                self._seats.load(self._state)
        self.inner.load_state_dict(rest)
