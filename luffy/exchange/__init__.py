"""Differentiable stages that execute an exchange: condense, copies, dispatch, permute, combine or rebuild."""

from luffy.exchange.audit import tally
from luffy.exchange.combine import combine
from luffy.exchange.condense import Condensed, CondenseState, History, condense, only_sent
from luffy.exchange.copies import Copies, ExpertMap, all_local, copy_keys, exchange_counts
from luffy.exchange.dispatch import Received, dispatch
from luffy.exchange.migrate import (
    Migration,
    alone_per_sequence,
    by_table,
    choices_per_sequence,
    counts_per_sequence,
    rows_at_favourite,
    transfer,
)
from luffy.exchange.permute import pairs_by_expert
from luffy.exchange.planning import Planned, Planner, PlanTally
from luffy.exchange.rebuild import SharedAnswers, carries_residual, combine_at_new_home, orphan_tokens, own_shared
from luffy.exchange.recorder import Recorder
from luffy.exchange.shared import combine_condensed, rows_to_send
from luffy.exchange.stage import Stage, alternate, finish
from luffy.exchange.wire import Draws, codecs_of, residual_codec

__all__ = [
    "CondenseState",
    "Condensed",
    "Copies",
    "Draws",
    "ExpertMap",
    "History",
    "Migration",
    "PlanTally",
    "Planned",
    "Planner",
    "Received",
    "Recorder",
    "SharedAnswers",
    "Stage",
    "all_local",
    "alone_per_sequence",
    "alternate",
    "by_table",
    "carries_residual",
    "choices_per_sequence",
    "codecs_of",
    "combine",
    "combine_at_new_home",
    "combine_condensed",
    "condense",
    "copy_keys",
    "counts_per_sequence",
    "dispatch",
    "exchange_counts",
    "finish",
    "only_sent",
    "orphan_tokens",
    "own_shared",
    "pairs_by_expert",
    "residual_codec",
    "rows_at_favourite",
    "rows_to_send",
    "tally",
    "transfer",
]
