"""One look over the corpus before it is tokenised: is it sound, what is held out, what trains the tokenizer.

Reading twice costs a few percent of the tokenisation, and buys three things: a broken line near the end is
named within seconds instead of after hours, progress has a known end, and both choices below can look at all
documents instead of the first ones (corpora are often sorted by domain).

Both choices order documents by a hash of their index: a uniform draw that every machine repeats exactly.
"""

import heapq
import os
from array import array
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from luffy.data.corpus import Document, ReadTally, SplitName, iter_documents
from luffy.data.progress import Progress, no_progress
from luffy.errors import UserError

# Of the tokenizer's training sample: beyond a few megabytes the merges hardly change (8 against 20 million
# characters: 0.5% more tokens), while training time grows linearly.
SAMPLE_CHARACTERS = 8_000_000
SAMPLE_CHARACTERS_PER_DOCUMENT = 1 << 16  # so that no single huge document is most of the sample

_HINTS: tuple[SplitName | None, ...] = (None, "train", "valid")
_REPORT_EVERY = 256  # documents


@dataclass(frozen=True)
class CorpusSurvey:
    """What the look found: for each document its length, hash and split hint (arrays [num_documents])."""

    num_characters: np.ndarray
    keys: np.ndarray
    hints: np.ndarray
    num_empty: int
    sample: list[str]


@dataclass(frozen=True)
class HeldOut:
    """Which documents are held out. `cut` = (document, character): the rest of that one is, too."""

    is_valid: np.ndarray
    cut: tuple[int, int] | None = None

    def route(self, documents: Iterator[Document]) -> Iterator[tuple[SplitName, str]]:
        """Name the split of each document; raises `UserError` if they are not the ones that were surveyed."""
        index = -1
        for index, document in enumerate(documents):
            if index >= len(self.is_valid):
                break
            if self.cut is not None and self.cut[0] == index:
                yield "train", document.text[: self.cut[1]]
                yield "valid", document.text[self.cut[1] :]
            else:
                yield ("valid" if self.is_valid[index] else "train"), document.text
        if index + 1 != len(self.is_valid):
            raise UserError("--data changed while it was being read: run again once nothing writes to it")


def survey_corpus(
    source: str | os.PathLike[str],
    text_field: str,
    *,
    sample_characters: int = SAMPLE_CHARACTERS,
    progress: Progress = no_progress,
) -> CorpusSurvey:
    """Read all documents once. Raises `UserError` as `iter_documents` does."""
    num_characters, keys, hints = array("Q"), array("Q"), array("B")
    tally = ReadTally()
    # The documents of smallest hash so far whose texts fit the budget: a heap with the largest hash on top.
    sample: list[tuple[int, int, str]] = []
    sampled = 0
    for index, document in enumerate(iter_documents(source, text_field, tally)):
        key = hash_index(index)
        num_characters.append(len(document.text))
        keys.append(key)
        hints.append(_HINTS.index(document.split))
        wanted = sampled < sample_characters or (bool(sample) and key < -sample[0][0])
        if wanted and document.split != "valid":
            text = document.text[:SAMPLE_CHARACTERS_PER_DOCUMENT]
            heapq.heappush(sample, (-key, index, text))
            sampled += len(text)
            while sampled - len(sample[0][2]) >= sample_characters:
                sampled -= len(heapq.heappop(sample)[2])
        if index % _REPORT_EVERY == 0:
            progress(index, None, "reading")
    sample.sort(key=lambda entry: entry[1])
    return CorpusSurvey(
        np.frombuffer(num_characters, dtype=np.uint64).astype(np.int64),
        np.frombuffer(keys, dtype=np.uint64),
        np.frombuffer(hints, dtype=np.uint8),
        tally.num_empty,
        [text for _, _, text in sample],
    )


def choose_held_out(survey: CorpusSurvey, valid_fraction: float) -> HeldOut:
    """The held-out split of a surveyed corpus.

    Files that are named as held-out decide. Otherwise documents are drawn in hash order until they hold
    `valid_fraction` of the characters, none of them larger than that share; if none is so small, the smallest
    document is taken; and where that leaves less than half of the share (a corpus of one document, or of one
    giant and crumbs) the end of the longest document is held out as well, cut by characters. Raises
    `UserError` when files named as held-out hold all the text.
    """
    from_files = survey.hints == _HINTS.index("valid")
    if from_files.all():
        raise UserError("--data: only the held-out files hold text, every other document is empty")
    if from_files.any():
        return HeldOut(from_files)

    lengths = survey.num_characters
    total = int(lengths.sum())
    budget = min(max(1, int(valid_fraction * total)), total - 1)  # a character on either side, if there are two
    is_valid = np.zeros(len(lengths), dtype=bool)
    order = np.argsort(survey.keys, kind="stable")
    order = order[lengths[order] <= budget]
    is_valid[order[np.cumsum(lengths[order]) <= budget]] = True
    if not is_valid.any() and len(lengths) > 1:
        is_valid[np.argmin(lengths)] = True

    missing = budget - int(lengths[is_valid].sum())
    if 2 * missing <= budget:
        return HeldOut(is_valid)
    longest = int(np.argmax(np.where(is_valid, 0, lengths)))
    position = max(1, int(lengths[longest]) - missing)
    return HeldOut(is_valid, (longest, position))


def hash_index(index: int) -> int:
    """A 64-bit hash: the output function of SplitMix64 (Steele, Lea and Flood, 2014)."""
    z = (index + 1) * 0x9E3779B97F4A7C15 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 30) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
    z = (z ^ z >> 27) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
    return z ^ z >> 31
