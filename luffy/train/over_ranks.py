"""Small numbers that each rank has of its own, as one of all ranks: in a single exchange."""

from __future__ import annotations

from collections.abc import Mapping

import torch

from luffy.comm import Comm


def over_ranks(
    comm: Comm, mean: Mapping[str, float], most: Mapping[str, float], total: Mapping[str, float] | None = None
) -> dict[str, float]:
    """The mean, the largest, or the sum of what all ranks give under each name. Every rank gives the same names."""
    total = total or {}
    mine = torch.tensor([*mean.values(), *most.values(), *total.values()], dtype=torch.float64)
    every = comm.all_gather_world(mine.to(comm.mesh.device)).cpu()
    a, b = len(mean), len(mean) + len(most)
    values = [*every[:, :a].mean(0).tolist(), *every[:, a:b].amax(0).tolist(), *every[:, b:].sum(0).tolist()]
    return dict(zip([*mean, *most, *total], values, strict=True))
