"""Differentiable stages that execute an exchange: copies, dispatch, permute, combine."""

from luffy.exchange.combine import combine
from luffy.exchange.copies import Copies, ExpertMap, copy_keys, exchange_counts
from luffy.exchange.dispatch import Received, dispatch
from luffy.exchange.permute import Pairs, pairs_by_expert, weighted_sum

__all__ = [
    "Copies",
    "ExpertMap",
    "Pairs",
    "Received",
    "combine",
    "copy_keys",
    "dispatch",
    "exchange_counts",
    "pairs_by_expert",
    "weighted_sum",
]
