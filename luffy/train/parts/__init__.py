"""What happens around a training step: small objects that run under any trainer.

    for part in parts: part.before(step)
    ...                          forward, backward, optimizer.step()
    for part in parts: part.after(step, done)

A part takes a model, its communicator and its optimizer, and keeps what it learns: `state()` goes into a checkpoint,
`load` takes it up. Luffy's trainer runs all of them; under `transformers.Trainer` or in a loop of your own run those
that you want (docs/own_model.md).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Protocol

from luffy.data.batch import Layout
from luffy.model.aux_loss import RouterTotals
from luffy.plan.trace import TraceStep
from luffy.train.seating import SeatedStep


@dataclass
class Done:
    """A step that was made. record: what will be written down of it, the same on every rank; parts add to it.

    routers: what all routers did in the whole step, on all ranks. seated: its sequences; layouts: how those of each
    micro-batch lay on this rank. traced: recorded micro-batches, where anybody asked. plain: nothing was recorded and
    no expert moved, so that its time is like those of others. skipped: no update was made.
    """

    record: dict[str, Any]
    routers: RouterTotals | None = None
    seated: SeatedStep | None = None
    layouts: list[Layout] = field(default_factory=list)
    traced: list[TraceStep] = field(default_factory=list)
    plain: bool = True
    skipped: bool = False


class Part(Protocol):
    """`step` counts from 0. Every rank calls everything."""

    name: str

    def records(self, step: int) -> bool:
        """Whether the micro-batches of this step are to be recorded, for `Done.traced`."""
        ...

    def before(self, step: int) -> None: ...

    def after(self, step: int, done: Done) -> None: ...

    def state(self) -> dict[str, Any]:
        """JSON values and tensors, the same on every rank."""
        ...

    def load(self, state: dict[str, Any]) -> None:
        """Take up a state, perhaps of a run at another number of ranks, or {}."""
        ...


class Stateless:
    """A part that records nothing, keeps nothing and has nothing to do, but for what its subclass says."""

    def records(self, step: int) -> bool:
        return False

    def before(self, step: int) -> None:
        pass

    def after(self, step: int, done: Done) -> None:
        pass

    def state(self) -> dict[str, Any]:
        return {}

    def load(self, state: dict[str, Any]) -> None:
        pass
