"""Which way to run each layer, from its recorded routing and from what this cluster does in a second.

A layer's part of a step that depends on the choice, forward and backward, is taken as

    2 (dispatch + combine)  +  pairs of the busiest rank * seconds a pair  +  delivery of experts

with each exchange as long as its busiest rank needs (`luffy.plan.prediction`). Fetching begins before attention, so
that its first round costs what attention does not hide; in the backward pass, where gradients are synchronised at the
same time, it hides nowhere, and neither do shadows and second rounds. What no formula here
knows (planning, launches, ranks waiting for each other) is an offset, learnt from steps that were run: predictions are
of the difference that a choice makes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from luffy.plan.prediction import token_seconds
from luffy.plan.replay import LayerReplay, Wire, replay_step
from luffy.plan.trace import TraceStep
from luffy.wire_format import RowBytes

RESIDENCIES = ("static", "fetch", "shadow")


@dataclass(frozen=True)
class Mode:
    """How the layers of a model are run: whether sequences move, each layer's residency, the format of rows, and
    whether similar tokens share one."""

    moves: bool
    residency: tuple[str, ...]
    wire: str = "model"
    condenses: bool = False

    @property
    def name(self) -> str:
        """For people: the recipe that it amounts to, or the mixture."""
        kinds = set(self.residency)
        more = ("" if self.wire == "model" else f"+{self.wire}") + ("+condensed" if self.condenses else "")
        if len(kinds) == 1:
            kind = next(iter(kinds))
            named = {"static": "vanilla_dedup", "fetch": "janus", "shadow": "fastermoe"}
            return (named[kind] if not self.moves else "migrate" + ("" if kind == "static" else f"+{kind}")) + more
        counts = ",".join(f"{k} {self.residency.count(k)}" for k in RESIDENCIES if k in kinds)
        return ("migrate" if self.moves else "stay") + f" ({counts})" + more

    def to_dict(self) -> dict[str, Any]:
        return {**vars(self), "residency": list(self.residency)}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> "Mode":
        return cls(**{**data, "residency": tuple(data["residency"])})


@dataclass(frozen=True)
class LayerRates:
    """Seconds: of one (row, expert) pair, and of attention in one block, forward and backward."""

    pair: float
    attention: float


def layer_seconds(layer: LayerReplay, wire: Wire, rates: LayerRates) -> float:
    """The part of one layer, forward and backward, that the choice changes."""
    first, second = layer.expert_seconds
    if wire.residency == "fetch":  # a third of attention's time is its forward pass
        delivery = 2 * second + max(0.0, first - rates.attention / 3) + first
    else:
        delivery = 2 * (first + second)
    return token_seconds(layer, wire) + float(layer.pairs.max(initial=0)) * rates.pair + delivery


def weigh(
    steps: Sequence[TraceStep],
    owners: np.ndarray,
    wire: Wire,
    rates: LayerRates,
    moving: str = "best",
    formats: Mapping[str, RowBytes] | None = None,
    also: Mode | None = None,
) -> dict[Mode, float]:
    """Modelled seconds of the recorded micro-batches, summed, by mode: the uniform ones and the best mixtures.

    wire: strategy and residency are replaced; `moving` is the strategy where sequences move. formats: wire formats that
    may be used where sequences stay, with the bytes of their rows. also: a mode of these that is to be in the answer.
    """
    L = steps[0].num_layers
    out: dict[Mode, float] = {}
    ways: list[tuple[bool, str, RowBytes | None]] = [(False, "model", None), (True, "model", None)]
    for moves, name, sizes in ways + [(False, n, b) for n, b in (formats or {}).items()]:
        table: dict[str, np.ndarray] = {}
        for residency in RESIDENCIES:
            way = replace(
                wire,
                strategy=moving if moves else "stay",
                look_ahead="router" if moves else "none",
                residency=residency,
                row_bytes=sizes,
            )
            replays = [replay_step(step, owners, way, step.home_rank) for step in steps]
            table[residency] = np.sum([[layer_seconds(x, way, rates) for x in r] for r in replays], axis=0)
        for residency, seconds in table.items():
            out[Mode(moves, (residency,) * L, name)] = float(seconds.sum())
        stacked = np.stack([table[k] for k in RESIDENCIES])  # [3, L]
        mixed = Mode(moves, tuple(RESIDENCIES[i] for i in stacked.argmin(0)), name)
        out[mixed] = float(stacked.min(0).sum())
        if also is not None and (also.moves, also.wire) == (moves, name):
            out[also] = float(sum(table[kind][i] for i, kind in enumerate(also.residency)))
    return out
