"""Numbers of a model's exchange for whatever logger: `wandb.log(luffy.metrics(model))`.

For any model that holds `luffy.MoEBlock`s, and for what `luffy.hf.parallelize` returns.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from torch import nn

from luffy.comm.meter import INTER_NODE, INTRA_NODE, by_direction
from luffy.compose import Runtime
from luffy.exchange.tally import busiest_over_mean
from luffy.model.ownership import runtimes_of


def metrics(model: nn.Module) -> dict[str, float]:
    """What the layers of `model` have exchanged since the last call, as this rank knows it. Nothing is sent for it.

    bytes_sent: by this rank, and of these bytes_between_nodes; bytes_<direction> for each direction of
    luffy.comm.meter. Gradients are among them where `GradientSync` was given the layers' `comm`; what your own DDP or
    FSDP sends is not. rows_sent: token rows by this rank to others, forward. Of its expert-parallel group: rows_home,
    the share of rows that stay on their rank; busiest_rank, the rows in or out of the busiest rank of each exchange
    over the mean (1 is even); expert_rank_load, the rows at the rank whose experts get most of them over the mean.

    Counts start again from zero, also for others who `take` them from the meter. UserError for a model without experts.
    """
    return numbers_of(runtimes_of(model, "metrics"))


def numbers_of(runtimes: Sequence[Runtime]) -> dict[str, float]:
    """As `metrics`, of the layers that share these runtimes."""
    meters = list({id(rt.comm.meter): rt.comm.meter for rt in runtimes}.values())
    sent = np.sum([meter.take() for meter in meters], axis=0)
    rows = _rows(runtimes)
    ep_rank = runtimes[0].comm.mesh.ep_rank
    all_rows = sum(rows.values(), np.zeros_like(next(iter(rows.values()), np.zeros((1, 1), dtype=np.int64))))
    total, at_ranks = all_rows.sum(), all_rows.sum(0)
    return {
        "bytes_sent": float(sent[:, INTRA_NODE:].sum()),
        "bytes_between_nodes": float(sent[:, INTER_NODE].sum()),
        **{f"bytes_{name}": float(n) for name, n in by_direction(sent).items()},
        "rows_sent": float(all_rows[ep_rank].sum() - all_rows[ep_rank, ep_rank]) if rows else 0.0,
        "rows_home": float(np.trace(all_rows) / total) if total else 1.0,
        "busiest_rank": busiest_over_mean(rows),
        "expert_rank_load": float(at_ranks.max() / at_ranks.mean()) if total else 1.0,
    }


def _rows(runtimes: Sequence[Runtime]) -> dict[int, np.ndarray]:
    """Rows between ranks by layer, of all runtimes."""
    rows: dict[int, np.ndarray] = {}
    for runtime in runtimes:
        for layer, counts in runtime.tally.take().items():
            rows[layer] = rows.get(layer, 0) + counts
    return rows
