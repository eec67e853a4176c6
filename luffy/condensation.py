"""What `--condense` can say: how alike tokens are found, and how alike they must be.

    none          every copy travels
    static:0.9    cosine of the experts' inputs at least 0.9
    paper         threshold of equation 2 of arXiv 2411.15419, 1 / (1 + exp((l_ini - l) / l_ini)), over its whole
                  similarity graph with the history filter
    lsh:6         LSH-MoE: equal under six cross-polytope hashes; centroids travel, Y = E(c) + (x - c)
    lsh-causal:6  the same with a bucket's earliest token in place of its centroid

Behind it, separated by commas:

    local         copies that stay on their rank are condensed too: less computing, no fewer bytes
    window=64     copies among which a representative is looked for (16, 32, 64 or 128)
    correct       a token adds to the shared answer what it differs by: Y = E(c) + (x - c), as LSH-MoE does
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from luffy.errors import UserError
from luffy.ranges import Range

WINDOWS = ("16", "32", "64", "128")
POLICIES = ("static", "paper", "lsh", "lsh-causal")
EXAMPLES = "none, static:0.9, paper, lsh:6, lsh-causal:6"


@dataclass(frozen=True)
class Condensation:
    """How tokens are condensed.

    policy: as in `--condense`. level: the threshold or the number of hashes.
    window: copies among which a representative is looked for; 0: all that go from one rank to one expert.
    history: the paper's filter: a pair above 0.8 in the previous block is alike, below 0.2 it is not.
    nearest: a token goes to the most similar representative; else to the first that covers it.
    local: copies that stay on their rank are condensed too, which saves computing but no traffic.
    representative: "member" sends one of the tokens, "centroid" their mean (LSH-MoE, which so tells of the future).
    compensate: a token adds its difference to what was sent for it: Y = E(c) + (x - c).
    """

    policy: str
    level: float
    window: int = 128
    history: bool = False
    nearest: bool = True
    local: bool = False
    representative: str = "member"
    compensate: bool = False

    @property
    def hashed(self) -> bool:
        """Whether alike is what hashes alike, instead of what is close."""
        return self.policy.startswith("lsh")


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
    if extra == "correct":
        return replace(scheme, compensate=True)
    if extra.startswith("window=") and extra[7:] in WINDOWS and not scheme.hashed:
        return replace(scheme, window=int(extra[7:]))
    raise UserError(
        f"--condense {text}: cannot read {extra!r}; behind the scheme may stand local, correct, "
        f"window=N with N one of {', '.join(WINDOWS)}"
    )
