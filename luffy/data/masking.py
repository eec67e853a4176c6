"""Masked language modelling: hide some tokens of a sequence and ask for those (BERT: Devlin et al., 2019).

Some places are chosen; of these 80% become the mask token, 10% a random token and 10% stay as they are, so
that a model cannot rely on the mask token to tell where it will be asked. Only chosen places carry a label:
the original token.
"""

from dataclasses import replace

import numpy as np

from luffy.data.loader import IGNORE_INDEX, Sequence

# Sets these draws apart from the loader's permutations, which use the same generator and seed from counter 0.
_COUNTER = (0, 0, 0, 1)
_UINT64 = 2**64 - 1


def mask_for_mlm(
    sequence: Sequence, *, mask_id: int, vocab_size: int, seed: int, probability: float = 0.15
) -> Sequence:
    """A masked copy of `sequence`, the same for the same (seed, sequence_id) everywhere.

    Each place is chosen with `probability`, and at least one always is. Raises `ValueError` for a probability
    outside [0, 1].
    """
    if not 0 <= probability <= 1:
        raise ValueError(f"probability {probability} is not in [0, 1]")
    length = len(sequence.tokens)
    key = np.array([seed & _UINT64, sequence.sequence_id & _UINT64], dtype=np.uint64)
    philox = np.random.Philox(key=key, counter=np.array(_COUNTER, dtype=np.uint64))
    # Integers throughout, from the generator's raw output: no platform can round them differently.
    choice, action, replacement = philox.random_raw(3 * length).reshape(3, length)
    chosen = (choice >> np.uint64(11)) < np.uint64(int(probability * 2**53))
    if not chosen.any():
        chosen[np.argmin(choice)] = True
    action %= np.uint64(10)  # 0..7: mask, 8: random token, 9: keep
    random_tokens = (replacement % np.uint64(vocab_size)).astype(np.int64)
    tokens = np.where(chosen & (action < 8), mask_id, sequence.tokens)
    tokens = np.where(chosen & (action == 8), random_tokens, tokens)
    return replace(sequence, tokens=tokens, labels=np.where(chosen, sequence.tokens, IGNORE_INDEX))
