"""What `--condense` can say: how alike tokens are found, and how alike they must be.

    none          every copy travels
    static:0.9    cosine of the experts' inputs at least 0.9
    paper         threshold of equation 2 of arXiv 2411.15419, 1 / (1 + exp((l_ini - l) / l_ini)), over its whole
                  similarity graph with the history filter
    budget:0.1    threshold of each layer moved until the measured relative error of an answer that is shared is 0.1
    lsh:6         LSH-MoE: equal under six cross-polytope hashes; centroids travel, Y = E(c) + (x - c)
    lsh-causal:6  the same with a bucket's earliest token in place of its centroid

Behind it, separated by commas:

    local         copies that stay on their rank are condensed too: less computing, no fewer bytes
    window=64     copies among which a representative is looked for (16, 32, 64 or 128)
    centroid      the mean of alike tokens travels in place of one of them (encoders only: it tells of the future)
    correct       a token adds to the shared answer what it differs by: Y = E(c) + (x - c), as LSH-MoE does
    spread        backward, what comes back is shared among the tokens as if their mean had been sent
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from luffy.errors import UserError
from luffy.ranges import SHARE, Range

WINDOWS = ("16", "32", "64", "128")
POLICIES = ("static", "paper", "budget", "lsh", "lsh-causal")
EXAMPLES = "none, static:0.9, paper, budget:0.1, lsh:6, lsh-causal:6"


@dataclass(frozen=True)
class Condensation:
    """How tokens are condensed.

    policy: as in `--condense`. level: the threshold, the error budget or the number of hashes.
    window: copies among which a representative is looked for; 0: all that go from one rank to one expert.
    history: the paper's filter: a pair above 0.8 in the previous block is alike, below 0.2 it is not.
    nearest: a token goes to the most similar representative; else to the first that covers it.
    local: copies that stay on their rank are condensed too, which saves computing but no traffic.
    representative: "member" sends one of the tokens, "centroid" their mean.
    gradient: "exact" of the condensed forward; "spread": every token gets the mean's share of what comes back.
    compensate: a token adds its difference to what was sent for it: Y = E(c) + (x - c).
    audit_share: share of condensed copies that is sent anyway, to measure the error (policy budget).
    """

    policy: str
    level: float
    window: int = 128
    history: bool = False
    nearest: bool = True
    local: bool = False
    representative: str = "member"
    gradient: str = "exact"
    compensate: bool = False
    audit_share: float = 1 / 32

    @property
    def hashed(self) -> bool:
        """Whether alike is what hashes alike, instead of what is close."""
        return self.policy.startswith("lsh")

    @property
    def audits(self) -> bool:
        """Whether some condensed copies are sent anyway, to measure the error."""
        return self.policy == "budget"


def parse_condense(text: str) -> Condensation | None:
    """The scheme that `--condense` names, None for "none"; raises UserError naming the option."""
    spec, *extras = (part.strip() for part in text.split(","))
    name, colon, value = spec.partition(":")
    if name == "none" and not colon and not extras:
        return None
    level = {"paper": 0.5, "lsh": 6.0, "lsh-causal": 6.0}.get(name)
    if name not in POLICIES or (level is None and not colon) or (name == "paper" and colon):
        raise UserError(f"--condense {text}: unknown; give one of {EXAMPLES}")
    if colon:
        try:
            level = float(value)
        except ValueError:
            raise UserError(f"--condense {text}: {value!r} is not a number; give one of {EXAMPLES}") from None
    assert level is not None
    if name == "static" and level not in Range(-1, 1):
        raise UserError(f"--condense {text}: the least cosine of alike tokens, {Range(-1, 1)}")
    if name == "budget" and level not in SHARE:
        raise UserError(f"--condense {text}: the error budget is {SHARE}")
    if name.startswith("lsh") and (level not in Range(1, 16) or level != int(level)):
        raise UserError(f"--condense {text}: the hashes are {Range(1, 16, whole=True)}")
    scheme = Condensation(name, level)
    if name == "paper":
        scheme = replace(scheme, window=0, history=True, nearest=False, local=True)
    elif name == "lsh":
        scheme = replace(scheme, local=True, representative="centroid", compensate=True)
    elif name == "lsh-causal":
        scheme = replace(scheme, compensate=True)
    for extra in extras:
        scheme = _with_extra(scheme, extra, text)
    return scheme


def _with_extra(scheme: Condensation, extra: str, text: str) -> Condensation:
    if extra == "local":
        return replace(scheme, local=True)
    if extra == "centroid" and not scheme.hashed:
        return replace(scheme, representative="centroid")
    if extra == "correct":
        return replace(scheme, compensate=True)
    if extra == "spread":
        return replace(scheme, gradient="spread")
    if extra.startswith("window=") and extra[7:] in WINDOWS and not scheme.hashed:
        return replace(scheme, window=int(extra[7:]))
    raise UserError(
        f"--condense {text}: cannot read {extra!r}; behind the scheme may stand local, centroid, correct, spread, "
        f"window=N with N one of {', '.join(WINDOWS)}"
    )
