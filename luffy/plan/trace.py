"""A routing trace: which experts every token of a few training steps chose, and in which sequences.

That is all one has to know to say, for any number of ranks, any mapping of experts and any placement strategy, how many
rows would have crossed which links (see replay.py). A trace is recorded once, on whatever machine trains the model, and
answers questions about clusters that nobody has at hand. It holds no text and no weights; of token ids, only features
(sums of random directions), from which seats of sequences can be predicted.

Tokens stand in the order of the step's sequence table: sequence after sequence, whichever rank held them.
"""

import json
import os
import zipfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from luffy.errors import UserError

FORMAT_VERSION = 1


@dataclass(frozen=True, eq=False)
class TraceStep:
    """One micro-batch of one EP group.

    lengths [S]: tokens. home_rank [S]: where each sequence was read. chosen int16 [layers, T, K]: expert ids, -1 where
    capacity dropped the choice. foreseen int16 [layers - 1, T, K]: what the router of layer l + 1 chooses when it is
    applied to the stream before layer l; a forecast of chosen[l + 1]. features int16 [S, DIM]: what the token ids of
    each sequence are like (luffy.seats.features), from which its seat can be predicted; None: not recorded.
    """

    step: int
    lengths: np.ndarray
    home_rank: np.ndarray
    chosen: np.ndarray
    foreseen: np.ndarray
    features: np.ndarray | None = None

    @property
    def num_layers(self) -> int:
        return self.chosen.shape[0]

    @cached_property
    def sequence_of_token(self) -> np.ndarray:
        """int64 [T]."""
        return np.repeat(np.arange(len(self.lengths)), self.lengths)

    def count_by_sequence(self, ids: np.ndarray, size: int, *, once: bool = True) -> np.ndarray:
        """int64 [S, size]: how often the tokens of each sequence name each of 0..size-1 in their ids [T, K].

        -1 is passed over. once: a token counts once for each that it names. Takes memory of T K, not of T size.
        """
        counted = first_mentions(ids) if once else ids >= 0
        cells = (self.sequence_of_token[:, None] * size + ids)[counted]
        return np.bincount(cells, minlength=len(self.lengths) * size).reshape(-1, size)

    def counts_by_expert(self, layer: int, num_experts: int) -> np.ndarray:
        """int64 [S, E]: tokens of each sequence that chose each expert."""
        return self.count_by_sequence(self.chosen[layer], num_experts)


def first_mentions(ids: np.ndarray) -> np.ndarray:
    """bool [T, K]: ids that are not -1 and do not stand further left in their row too."""
    first = ids >= 0
    for k in range(1, ids.shape[1]):
        first[:, k] &= (ids[:, :k] != ids[:, k : k + 1]).all(1)
    return first


@dataclass(frozen=True, eq=False)
class RoutingTrace:
    """Recorded steps of one model. `row_num_bytes`: one row of the residual stream on the wire, un-quantised.

    `owners` int64 [layers, E]: the EP rank of each expert when the trace was made. `about`: what a reader wants to know
    besides (preset, recipe, seed).
    """

    steps: tuple[TraceStep, ...]
    num_experts: int
    top_k: int
    hidden_size: int
    row_num_bytes: int
    owners: np.ndarray
    about: dict[str, Any]

    @property
    def num_layers(self) -> int:
        return self.owners.shape[0]

    def __post_init__(self) -> None:
        E = self.num_experts
        if self.owners.ndim != 2 or self.owners.shape[1] != E:
            raise ValueError(f"trace: owners is {self.owners.shape}, not [layers, {E}]")
        for s in self.steps:
            want = (self.num_layers, int(s.lengths.sum()), self.top_k)
            if s.chosen.shape != want:
                raise ValueError(f"trace: step {s.step} has choices of shape {s.chosen.shape}, not {want}")
            if s.foreseen.shape != (max(0, want[0] - 1), *want[1:]):
                raise ValueError(f"trace: step {s.step} has forecasts of shape {s.foreseen.shape}")
            if s.features is not None and (s.features.ndim != 2 or len(s.features) != len(s.lengths)):
                raise ValueError(f"trace: step {s.step} has features of shape {s.features.shape}")
            if s.chosen.size and not (s.chosen.min() >= -1 and s.chosen.max() < E):
                raise ValueError(f"trace: step {s.step} names an expert outside 0..{E - 1}")

    def save(self, path: Path) -> None:
        """Write one compressed .npz, whole or not at all. Raises UserError where the disk refuses."""
        header = {
            "format": FORMAT_VERSION,
            "num_experts": self.num_experts,
            "top_k": self.top_k,
            "hidden_size": self.hidden_size,
            "row_num_bytes": self.row_num_bytes,
            "steps": [s.step for s in self.steps],
            "about": self.about,
        }
        arrays: dict[str, np.ndarray] = {"header": np.array(json.dumps(header)), "owners": self.owners}
        for i, s in enumerate(self.steps):
            arrays |= {f"lengths.{i}": s.lengths, f"home_rank.{i}": s.home_rank}
            arrays |= {f"chosen.{i}": s.chosen, f"foreseen.{i}": s.foreseen}
            if s.features is not None:
                arrays[f"features.{i}"] = s.features
        temporary = path.with_suffix(".tmp.npz")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez_compressed(temporary, **arrays)  # type: ignore[arg-type]
            os.replace(temporary, path)
        except OSError as error:
            raise UserError(f"trace {path} not written: {error.strerror or error}") from error

    @classmethod
    def load(cls, path: Path) -> "RoutingTrace":
        """Raises UserError where the file is missing, damaged or not a trace."""
        try:
            with np.load(path, allow_pickle=False) as file:
                header = json.loads(str(file["header"]))
                if header["format"] != FORMAT_VERSION:
                    raise UserError(f"trace {path} was written by another version of luffy; record it again")
                names = ("lengths", "home_rank", "chosen", "foreseen")
                steps = tuple(
                    TraceStep(step, **{name: file[f"{name}.{i}"] for name in names}, features=file.get(f"features.{i}"))
                    for i, step in enumerate(header["steps"])
                )
                sizes = {k: header[k] for k in ("num_experts", "top_k", "hidden_size", "row_num_bytes", "about")}
                return cls(steps=steps, owners=file["owners"], **sizes)
        except FileNotFoundError as error:
            raise UserError(f"trace {path} does not exist; `luffy train --trace-every N` records one") from error
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"trace {path} is damaged or no trace ({error})") from error


def join_traces(traces: Sequence[RoutingTrace]) -> RoutingTrace:
    """The steps of several traces of one run, in their order, as one. The owners are the last one's.

    Raises ValueError where there is none or their models differ.
    """
    if not traces:
        raise ValueError("no trace to join")
    last = traces[-1]
    for t in traces:
        if (t.num_experts, t.top_k, t.num_layers) != (last.num_experts, last.top_k, last.num_layers):
            raise ValueError("traces of different models cannot be joined")
    steps = tuple(s for t in traces for s in t.steps)
    return RoutingTrace(
        steps, last.num_experts, last.top_k, last.hidden_size, last.row_num_bytes, last.owners, last.about
    )
