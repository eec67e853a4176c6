"""Settings that cover every pair: most errors need two settings to meet, hardly any need three.

`covering_rows` takes the full product of some factors and completes each row with values of the others, so that any
two values of any two factors occur together in some row.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Mapping, Sequence
from typing import Any

Row = dict[str, Any]
Pair = tuple[tuple[str, Any], tuple[str, Any]]


def pairs_of(row: Row) -> set[Pair]:
    return set(itertools.combinations(sorted(row.items(), key=lambda item: item[0]), 2))


def all_pairs(factors: Mapping[str, Sequence[Any]]) -> set[Pair]:
    names = sorted(factors)
    return {
        ((a, x), (b, y))
        for a, b in itertools.combinations(names, 2)
        for x, y in itertools.product(factors[a], factors[b])
    }


def covering_rows(base: Mapping[str, Sequence[Any]], others: Mapping[str, Sequence[Any]]) -> list[Row]:
    """A row for each combination of `base`; the values of `others` chosen greedily, the same at every call."""
    chance = random.Random(0)
    missing = all_pairs({**base, **others})
    rows = []
    for values in itertools.product(*base.values()):
        fixed = dict(zip(base, values, strict=True))
        candidates = [
            {**fixed, **{name: chance.choice(list(options)) for name, options in others.items()}} for _ in range(60)
        ]
        best = max(candidates, key=lambda row: len(pairs_of(row) & missing))
        missing -= pairs_of(best)
        rows.append(best)
    return rows
