"""What a run reads, from its options: the corpus, and the sequences of each step and of the held-out part.

Whoever makes these from the same options trains on the same sequences in the same order, Luffy or not.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from luffy.config import ModelConfig
from luffy.data import SequenceLoader, prepare_corpus
from luffy.data.progress import Progress
from luffy.train.options import TrainOptions


@dataclass(frozen=True)
class Reading:
    """config: the model's, with the vocabulary of the corpus. loader: by micro-batch. valid_loader: the held-out part.

    mask_id: the token that stands for a hidden one, None for models that hide none. vocabulary: the tokenizer's file.
    """

    config: ModelConfig
    loader: SequenceLoader
    valid_loader: SequenceLoader
    mask_id: int | None
    vocabulary: str


def read_data(options: TrainOptions, progress: Progress | None = None) -> Reading:
    """Prepare the corpus if need be, and open it. Raises UserError as `prepare_corpus` does."""
    config = options.model_config()
    corpus = prepare_corpus(
        options.data,
        text_field=options.text_field,
        tokenizer=options.tokenizer,
        vocab_size=options.vocab_size or config.vocab_size,
        cache_dir=options.cache_dir,
        valid_fraction=options.valid_fraction,
        progress=progress,
    )
    config = config.override(vocab_size=corpus.vocab_size)

    def loader(split: Any, **changes: Any) -> SequenceLoader:
        return SequenceLoader(
            split,
            sequence_length=options.sequence_length or config.max_sequence_length,
            global_batch_size=options.batch_size // options.num_micro_batches,
            seed=options.seed,
            mode=options.sequence_mode,
            eos_id=corpus.eos_id,
            **changes,
        )

    mask_id = None if config.causal else corpus.mask_id
    vocabulary = corpus.tokenizer_path.read_text(encoding="utf-8")
    return Reading(config, loader(corpus.train), loader(corpus.valid, shuffle=False), mask_id, vocabulary)
