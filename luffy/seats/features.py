"""Features of sequences from their token ids alone: the mean of fixed random directions, one a token id.

A mean of random directions keeps what a count of every token id says, up to a noise that falls with the number of
dimensions (Johnson and Lindenstrauss), in a vector short enough to fit a regression to a few hundred sequences.

All ranks must get the same numbers. Directions are integers, -128 to 127, of the raw output of the counter-based
Philox generator, which NumPy promises never to change; sums of them are exact; only the mean is rounded, by integer
division. Token ids that are equal modulo `NUM_DIRECTIONS` share a direction, so a vocabulary may be of any size.
"""

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

DIM = 256  # keeps what matters of token counts at 256 integers a token (docs/research/seats.md)
NUM_DIRECTIONS = 1 << 16
ONE = 1 << 8  # features are in units of 1 / ONE: they fit 16 bits
_KEY = 0x5EA75
_BAG = 1 << 16  # tokens that are summed in float32: 128 * 2^16 = 2^23, where it still holds every integer


def sequence_features(tokens: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """int16 [S, DIM]: the mean direction of each sequence, in units of 1 / ONE; 0 where a sequence is empty.

    tokens: token ids >= 0, [T], sequence after sequence. lengths [S]: tokens of each. Raises ValueError where they
    disagree or an id is negative.
    """
    lengths = np.asarray(lengths, dtype=np.int64)
    if len(tokens) != int(lengths.sum()):
        raise ValueError(f"features: {len(tokens)} tokens for sequences of {int(lengths.sum())}")
    if not len(tokens):
        return np.zeros((len(lengths), DIM), dtype=np.int16)
    if int(tokens.min()) < 0:
        raise ValueError("features: token ids must be >= 0")
    # A long sequence is several bags, whose sums are added as integers.
    bags = -(-lengths // _BAG)
    sequence = np.repeat(np.arange(len(lengths)), bags)
    place = np.arange(len(sequence)) - np.repeat(np.cumsum(bags) - bags, bags)
    starts = (np.cumsum(lengths) - lengths)[sequence] + place * _BAG
    ids = torch.from_numpy(np.asarray(tokens) % NUM_DIRECTIONS)
    sums = F.embedding_bag(ids, _directions_for(int(ids.max())), torch.from_numpy(starts), mode="sum")
    total = np.zeros((len(lengths), DIM), dtype=np.int64)
    np.add.at(total, sequence, sums.numpy().astype(np.int64))
    n = np.maximum(1, lengths)[:, None]
    return ((total * ONE + n // 2) // n).astype(np.int16)


def features_of(sequences: Sequence[np.ndarray]) -> np.ndarray:
    """`sequence_features` of one array of token ids a sequence."""
    lengths = np.array([len(s) for s in sequences], dtype=np.int64)
    return sequence_features(np.concatenate([np.zeros(0, dtype=np.int64), *sequences]), lengths)


def _directions_for(token_id: int) -> Tensor:
    """float32 [V, DIM], V > token_id: the table grows by doubling, and a longer one begins with the shorter."""
    return _directions(max(1024, 1 << int(token_id).bit_length()))


@lru_cache(maxsize=1)
def _directions(num_tokens: int) -> Tensor:
    raw = np.random.Philox(key=np.array([_KEY, 0], dtype=np.uint64)).random_raw(num_tokens * DIM // 8)
    return torch.from_numpy(raw.astype("<u8").view(np.int8).reshape(num_tokens, DIM).astype(np.float32))
