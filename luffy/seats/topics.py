"""Seats by topic: what a sequence is about, from its token ids alone, and an even share of a batch for every topic.

A topic is a distribution over token ids. Topics are fitted by recursive bisection: a set of sequences is cut in two
halves of equally many tokens such that knowing the half says most about the tokens (two multinomials, fitted by
turns of assigning and counting; Dhillon et al., 2003, cluster words by the same measure). So neighbours c and c + 1
are the most alike: eight topics merge to four by adding counts, and a node's ranks hold kindred ones.

A batch is assigned by what a topic says of a sequence: the sum over its tokens of log2 q_c(v) / q(v), in integers. The
assignment maximises the batch's sum with equally many sequences a topic (exactly, as a linear assignment), then trades
sequences until no topic has more tokens than its budget. Every rank computes the same from the same sequences.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from scipy.sparse import csr_matrix

from luffy.errors import UserError
from luffy.plan.exact import assign

ONE = 1 << 10  # a table's unit is 1 / ONE of a bit
PRIOR = 2000  # tokens of the common distribution that each topic is given: rare tokens say little
NUM_FITTED = 4096  # sequences that a fit reads
STARTS, TURNS = 6, 15


class Topics:
    """C topics over token ids: `counts` int64 [C, V], the tokens of each id that the fit saw under each topic."""

    def __init__(self, counts: np.ndarray) -> None:
        self.counts = np.ascontiguousarray(counts, dtype=np.int64)
        common = self.counts.sum(0) + 0.5
        common = common / common.sum()
        share = (self.counts + PRIOR * common) / (self.counts.sum(1, keepdims=True) + PRIOR)
        table = np.round(ONE * np.log2(share / common)).astype(np.int64)  # [C, V]
        # One row more, for ids that the fit never knew of.
        self.table = np.concatenate([table.T, np.zeros((1, len(table)), dtype=np.int64)])

    @property
    def num_topics(self) -> int:
        return len(self.counts)

    @classmethod
    def fit(cls, sequences: Sequence[np.ndarray], num_topics: int, vocab_size: int, seed: int = 0) -> Topics:
        """Topics of sequences of token ids, each with an equal share of tokens. UserError if there are too few."""
        bags = _bags(sequences, vocab_size)
        counts = [bags[rows].sum(0) for rows in _bisect(bags, np.arange(len(sequences)), num_topics, seed)]
        return cls(np.concatenate([np.asarray(c) for c in counts]).astype(np.int64))

    def regrouped(self, num_topics: int, sequences: Sequence[np.ndarray] = (), seed: int = 0) -> Topics:
        """Fewer topics by merging neighbours, or more by cutting each in parts, for which `sequences` are fitted."""
        C, V = self.counts.shape
        if num_topics == C:
            return self
        if C % num_topics == 0:
            return Topics(self.counts.reshape(num_topics, C // num_topics, V).sum(1))
        if num_topics % C:
            raise UserError(
                f"--topics {num_topics}: the model was trained with {C}; choose a number that divides it, or a multiple"
            )
        bags, belongs, parts = _bags(sequences, V), self.gains(sequences).argmax(1), []
        for c in range(C):
            cut = _bisect(bags, np.flatnonzero(belongs == c), num_topics // C, seed)
            parts += [np.asarray(bags[rows].sum(0)).reshape(1, V) for rows in cut]
        return Topics(np.concatenate(parts).astype(np.int64))

    def gains(self, sequences: Sequence[np.ndarray]) -> np.ndarray:
        """int64 [S, C]: what each topic says of each sequence, in bits / ONE."""
        out = np.zeros((len(sequences), self.num_topics), dtype=np.int64)
        for i, tokens in enumerate(sequences):
            out[i] = self.table[np.minimum(tokens, len(self.table) - 1)].sum(0)
        return out

    def assign(self, sequences: Sequence[np.ndarray], slack: float = 0.05) -> np.ndarray:
        """int64 [S]: the topic of each sequence of a batch, within (1 + slack) of the mean tokens where that can be."""
        lengths = np.array([len(s) for s in sequences], dtype=np.int64)
        return self.assign_gains(self.gains(sequences), lengths, slack)

    def assign_gains(self, gains: np.ndarray, lengths: np.ndarray, slack: float = 0.05) -> np.ndarray:
        """`assign`, by what `gains` said of sequences of these lengths."""
        return balanced_assignment(gains, lengths, slack)

    def telling_ids(self, num: int = 12) -> np.ndarray:
        """int64 [C, num]: the token ids that tell most of each topic: count x log2 q_c / q, largest first."""
        weight = self.counts * self.table[:-1].T
        return np.argsort(-weight, axis=1, kind="stable")[:, :num]

    def save(self, path: Path) -> None:
        np.savez_compressed(path, counts=self.counts)

    @classmethod
    def load(cls, path: Path) -> Topics:
        """UserError where the file is not one that `save` wrote."""
        try:
            with np.load(path, allow_pickle=False) as data:
                return cls(data["counts"])
        except (OSError, KeyError, ValueError, EOFError, zipfile.BadZipFile) as error:
            raise UserError(f"topics {path} cannot be read ({error}); remove it to fit topics anew") from error


def balanced_assignment(gains: np.ndarray, lengths: np.ndarray, slack: float) -> np.ndarray:
    """int64 [S]: a topic for each sequence that maximises the sum of gains [S, C] with tokens spread evenly."""
    S, C = gains.shape
    if S == 0:
        return np.zeros(0, dtype=np.int64)
    topic = assign(gains, np.full(C, -(-S // C)))
    mean = -(-int(lengths.sum()) // C)
    budget = mean + int(mean * slack)
    for _ in range(4 * S):
        if not _trade(topic, gains, lengths, budget):
            break
    return topic


def _trade(topic: np.ndarray, gains: np.ndarray, lengths: np.ndarray, budget: int) -> bool:
    """Change `topic` by the best exchange of two sequences, or move of one: first what brings topics under their
    budget, at the least loss for a token; then what gains without breaking it. False if there is none."""
    S, C = gains.shape
    load = np.bincount(topic, weights=lengths, minlength=C).astype(np.int64)
    loss = gains[np.arange(S), topic][:, None] - gains  # [S, C]
    over = np.maximum(load - budget, 0)

    def relief(given: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        """Tokens over budget that go away when topics a give `given` tokens to topics b."""
        after = np.maximum(load[a] - given - budget, 0) + np.maximum(load[b] + given - budget, 0)
        return over[a] + over[b] - after

    # Moves: sequence i to topic c. Exchanges: i with j.
    move_relief = relief(lengths[:, None], topic[:, None], np.arange(C)[None])
    swap_loss = loss[:, topic] + loss[:, topic].T
    swap_relief = relief(lengths[:, None] - lengths[None], topic[:, None], topic[None])
    all_loss = np.concatenate([loss, swap_loss], axis=1)
    all_relief = np.concatenate([move_relief, swap_relief], axis=1)
    elsewhere = np.concatenate([topic[:, None] != np.arange(C), topic[:, None] != topic[None]], axis=1)
    if over.any():
        useful = elsewhere & (all_relief > 0)
        price = np.where(useful, (np.maximum(all_loss, 0) << 10) // np.maximum(all_relief, 1), np.iinfo(np.int64).max)
        if not useful.any():
            return False
    else:
        useful = elsewhere & (all_relief >= 0) & (all_loss < 0)
        price = np.where(useful, all_loss, 0)
        if not useful.any():
            return False
    i, to = np.unravel_index(int(price.argmin()), price.shape)
    if to < C:
        topic[i] = to
    else:
        topic[i], topic[to - C] = topic[to - C], topic[i]
    return True


def _bags(sequences: Sequence[np.ndarray], vocab_size: int) -> csr_matrix:
    """Counts of token ids, [S, V]."""
    ends = np.cumsum([len(s) for s in sequences])
    ids = np.concatenate([np.zeros(0, dtype=np.int64), *sequences])
    bags = csr_matrix((np.ones(len(ids)), ids, np.concatenate([[0], ends])), shape=(len(sequences), vocab_size))
    bags.sum_duplicates()
    return bags


def _bisect(bags: csr_matrix, rows: np.ndarray, num: int, seed: int) -> list[np.ndarray]:
    """`rows` of [S, V] in `num` parts of equally many tokens, neighbours alike."""
    if num == 1:
        return [rows]
    if len(rows) < num:
        raise UserError(f"--topics: {len(rows)} sequences are too few for {num} topics; give more data or fewer topics")
    left_share = (num + 1) // 2
    left = _halve(bags[rows], left_share / num, np.random.default_rng((seed, num)))
    parts = _bisect(bags, rows[left], left_share, seed)
    return parts + _bisect(bags, rows[~left], num - left_share, seed)


def _halve(bags: csr_matrix, share: float, rng: np.random.Generator) -> np.ndarray:
    """bool [S]: the part that holds `share` of the tokens and, with the rest, says most of them; best of starts."""
    length = np.asarray(bags.sum(1)).ravel()
    total = np.asarray(bags.sum(0)).ravel()
    common = (total + 0.01) / (total + 0.01).sum()
    best: tuple[float, np.ndarray] = (-np.inf, np.zeros(0, dtype=bool))
    for _ in range(STARTS):
        slope = rng.standard_normal(len(total)) / np.sqrt(np.maximum(total, 1))
        left = np.zeros(len(length), dtype=bool)
        for _ in range(TURNS):
            order = np.argsort(-(bags @ slope) / np.maximum(length, 1), kind="stable")
            size = np.searchsorted(np.cumsum(length[order]), share * length.sum())
            size = min(max(int(size), 1), len(length) - 1)
            now = np.zeros_like(left)
            now[order[:size]] = True
            if (now == left).all():
                break
            left = now
            mine = np.asarray(bags[left].sum(0)).ravel()
            here, there = (np.log((n + PRIOR * common) / (n.sum() + PRIOR)) for n in (mine, total - mine))
            slope = here - there
        said = float((mine * here + (total - mine) * there).sum())
        if said > best[0]:
            best = said, left
    return best[1]
