"""Who is late: from what each waiting rank saw of the others to one line that names the rank.

A rank that has waited too long in a collective reports whom it has not heard of, and who has not come to the
collective. Reports differ where links are cut: each side misses the other. The rank that most reports name is the one.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True)
class Report:
    """What one waiting rank knows.

    silent: ranks without a sign of life, and the seconds since the last one. behind: ranks that live, but are not in a
    collective or in an earlier step, and where they are. store_lost: this rank hears of nobody, since the store that
    signs of life go through does not answer; `store_rank` keeps it, None where no rank does.
    """

    rank: int
    host: str
    step: int
    where: str
    waited_seconds: float
    silent: dict[str, float] = field(default_factory=dict)
    behind: dict[str, str] = field(default_factory=dict)
    hosts: dict[str, str] = field(default_factory=dict)
    last: dict[str, str] = field(default_factory=dict)
    store_lost: bool = False
    store_rank: int | None = None
    logs: str = ""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def accused(reports: Sequence[Report]) -> str | None:
    """The rank that is late, as text; None where no report can tell."""
    votes: Counter[str] = Counter()
    for r in reports:
        if r.store_lost:
            votes[str(r.rank if r.store_rank is None else r.store_rank)] += 1
        for rank in r.silent or r.behind:
            votes[rank] += 1
    reported = {str(r.rank) for r in reports}
    # Of equally many votes: one that says nothing itself before one that does, then the highest.
    return max(votes, key=lambda rank: (votes[rank], rank not in reported, int(rank)), default=None)


def verdict(reports: Sequence[Report]) -> str:
    """One line: who is late, in which collective of which step and layer, last heard of when, on which host."""
    rank = accused(reports)
    seen = [r for r in reports if str(r.rank) != rank] or list(reports)
    first = next((r for r in seen if rank in r.silent or rank in r.behind), seen[0])
    waited = f"waited {first.waited_seconds:.0f} s in {first.where}, step {first.step}"
    logs = f"; see {first.logs}" if first.logs else ""
    if rank is None:
        return (
            f"rank {first.rank} on {first.host} {waited}, and so did all others: a link between them is cut, or they "
            f"do not agree on what comes next{logs}"
        )
    host = first.hosts.get(rank)
    on = f" on {host}" if host else ""
    if rank in first.silent:
        last = f" (in {first.last[rank]})" if rank in first.last else ""
        how = f"last heard of {first.silent[rank]:.0f} s ago{last}"
        if rank in {str(r.rank) for r in reports}:
            how += "; it lives, but the link to it is cut"
    elif rank in first.behind:
        how = f"it lives, and is in {first.behind[rank]}"
    else:
        how = f"it does not answer rank {first.rank}"
    return f"rank {rank}{on} is late: {how}. Rank {first.rank} {waited}{logs}"
