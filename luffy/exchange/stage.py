"""Stages that wait for rows: how two micro-batches share a link and a device without standing in each other's way.

A stage is a generator. It yields when what it waits for is under way, and returns its result. `finish` runs one as if
it were a function. `alternate` runs several by turns: while the rows of one micro-batch travel, the other computes.

    first    route, send | .................. experts, send | ............. attention, route, send | ...
    second               | route, send ...................  | experts, send ..............

All ranks take the same turns, so their collectives meet in the same order. The backward pass needs no schedule of its
own: autograd takes operations in the reverse of the order in which they were made, hence by turns too, and gradients of
one micro-batch travel while those of the other are computed (luffy.comm.rows). No operation changes, only when it runs.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from typing import TypeVar

Result = TypeVar("Result")
Stage = Generator[None, None, Result]


def finish(stage: Stage[Result]) -> Result:
    """Run a stage to its end, waiting wherever it has to."""
    (result,) = alternate([stage])
    return result


def alternate(stages: Sequence[Stage[Result]]) -> list[Result]:
    """Run stages by turns, each until it has rows under way; their results, in order."""
    results: dict[int, Result] = {}
    while len(results) < len(stages):
        for i, stage in enumerate(stages):
            if i in results:
                continue
            try:
                next(stage)
            except StopIteration as end:
                results[i] = end.value
    return [results[i] for i in range(len(stages))]
