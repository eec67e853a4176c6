"""Differentiable stages that execute an exchange: copies, dispatch, permute, combine."""

from luffy.exchange.combine import combine
from luffy.exchange.copies import Copies, ExpertMap, copy_keys, exchange_counts
from luffy.exchange.dispatch import Received, dispatch
from luffy.exchange.migrate import (
    Migration,
    by_table,
    carries_residual,
    combine_at_new_home,
    counts_per_sequence,
    rows_at_favourite,
    transfer,
)
from luffy.exchange.permute import Pairs, pairs_by_expert, weighted_sum
from luffy.exchange.planning import Planner, PlanTally
from luffy.exchange.recorder import Recorder
from luffy.exchange.wire import codecs_of

__all__ = [
    "Copies",
    "ExpertMap",
    "Migration",
    "Pairs",
    "PlanTally",
    "Planner",
    "Received",
    "Recorder",
    "by_table",
    "carries_residual",
    "codecs_of",
    "combine",
    "combine_at_new_home",
    "copy_keys",
    "counts_per_sequence",
    "dispatch",
    "exchange_counts",
    "pairs_by_expert",
    "rows_at_favourite",
    "transfer",
    "weighted_sum",
]
