"""What several of the data tests share."""

from pathlib import Path

import numpy as np

from luffy.data import Sequence, SequenceLoader, TokenCorpus, TokenSplit, prepare_corpus

OPTIONS = {"vocab_size": 300}


class Steps(list[str]):
    """Records what a build reports."""

    def __call__(self, done: int, total: int | None, description: str, /) -> None:
        assert total is None or 0 <= done <= total
        if description not in self:
            self.append(description)


def build(source: Path | str, cache: Path, **options: object) -> tuple[TokenCorpus, list[str]]:
    steps = Steps()
    return prepare_corpus(source, cache_dir=cache, progress=steps, **{**OPTIONS, **options}), steps  # type: ignore[arg-type]


def texts_of(corpus: TokenCorpus, split: str) -> list[str]:
    documents = getattr(corpus, split)
    return [corpus.tokenizer.decode(documents.document(index)) for index in range(documents.num_documents)]


EOS = 0


def loader_of(split: TokenSplit, length: int = 8, batch: int = 4, seed: int = 0, **options: object) -> SequenceLoader:
    return SequenceLoader(
        split,
        sequence_length=length,
        global_batch_size=batch,
        seed=seed,
        eos_id=EOS,
        **options,  # type: ignore[arg-type]
    )


def one_epoch(loader: SequenceLoader) -> list[Sequence]:
    steps = -(-loader.num_sequences // loader.global_batch_size)
    return [sequence for step in range(steps) for sequence in loader.batch(step)][: loader.num_sequences]


def same(one: list[Sequence], two: list[Sequence]) -> bool:
    return len(one) == len(two) and all(
        a.sequence_id == b.sequence_id
        and a.starts_stream == b.starts_stream
        and np.array_equal(a.tokens, b.tokens)
        and np.array_equal(a.labels, b.labels)
        for a, b in zip(one, two, strict=True)
    )
