"""Token condensation by hand: the similarity graph and its representatives, slowly and plainly.

What the fast path (luffy.kernels.representatives) must agree with, one group of copies at a time; loops over numpy
arrays that a reader can check against arXiv 2411.15419. Copies of one group go from one rank to the same expert;
`edges[i, j]` says that copy i may stand for copy j.

The paper keeps the copy of highest degree, condenses its neighbours onto it, and goes on with what is left. Whether
degrees are counted again after each removal it leaves open. Here each copy has one priority from the start, the
degree, ties to the lower index: then the outcome does not depend on the order in which parts of the graph are worked
on, so many copies can be decided at once. `recount=True` counts again; the two keep about as many copies.

In a decoder neither may be used: a degree counts later tokens too, so *which* token represents an early one would tell
of the future, and a representative that comes later would hand it over outright. There the order of tokens is the
priority: a token is condensed if one before it is alike. With several sequences in a group "before" means a lower
position; at equal positions, the lower sequence. A change at position p can then reach only positions from p on, in
whatever sequence, through any number of layers.
"""

from __future__ import annotations

import math

import numpy as np

ALIKE, UNLIKE = 0.8, 0.2  # S1 and S2 of the paper's history filter


def paper_threshold(initial_loss: float, loss: float) -> float:
    """Equation 2 of arXiv 2411.15419: 0.5 at first, falling to 0.27 as the loss goes to zero."""
    return 1.0 / (1.0 + math.exp((initial_loss - loss) / initial_loss))


def cosines(x: np.ndarray) -> np.ndarray:
    """[n, D] -> [n, n]; 0 to a row of zeros, its own included, and NaN to one of NaN."""
    norm = np.linalg.norm(x, axis=1, keepdims=True)
    unit = np.divide(x, norm, out=np.zeros_like(x), where=norm != 0)
    return unit @ unit.T


def filtered(similarity: np.ndarray, before: np.ndarray) -> np.ndarray:
    """The history filter: `before` [n, n] of the previous block, NaN where unknown; above S1 is 1, below S2 is 0."""
    return np.where(before > ALIKE, 1.0, np.where(before < UNLIKE, 0.0, similarity))


def similarity_edges(similarity: np.ndarray, threshold: float, causal: bool) -> np.ndarray:
    """bool [n, n]; copies are in the order of position and sequence. NaN is like nothing."""
    edges = similarity >= threshold
    np.fill_diagonal(edges, False)
    return np.triu(edges) if causal else edges


def representatives(
    edges: np.ndarray, similarity: np.ndarray, *, causal: bool, nearest: bool, recount: bool = False
) -> np.ndarray:
    """Who stands for each copy: int64 [n]; itself for those that travel.

    nearest: the most similar representative with an edge; else the first that covered the copy.
    """
    n = len(edges)
    leader = np.arange(n)
    open_ = np.ones(n, dtype=bool)
    chosen: list[int] = []
    degree = edges.sum(1)
    while open_.any():
        if recount:
            degree = (edges & open_).sum(1)
        candidates = np.flatnonzero(open_)
        best = candidates[0] if causal else candidates[np.argmax(degree[candidates])]
        chosen.append(best)
        covered = edges[best] & open_
        leader[covered] = best
        open_[covered] = False
        open_[best] = False
    if nearest:
        for j in np.flatnonzero(leader != np.arange(n)):
            able = [i for i in sorted(chosen) if edges[i, j]]
            leader[j] = max(able, key=lambda i: similarity[i, j])  # the first of equals: the lower index
    return leader
