"""New tokens: a tokenizer that knows them, and rows for them in embedding and head.

These begin as the mean of the others. That is what transformers' `resize_token_embeddings` does, but for noise of 3e-5
standard deviations that it adds.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from luffy.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt")


def open_tokenizer(folder: Path | str) -> Any:
    """The tokenizer of a model's folder; UserError where there is none that can be read."""
    from transformers import AutoTokenizer

    # Asked for a tokenizer that is not there, the library makes an empty one.
    if not any((Path(folder) / name).exists() for name in TOKENIZERS):
        raise UserError(f"--model {folder} holds no tokenizer ({', '.join(TOKENIZERS)})")
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever is wrong with it, the mend is the same
        raise UserError(f"--model {folder}: its tokenizer cannot be read ({_line(error)})") from error


def named_tokens(text: str) -> list[str]:
    """`<a>,<b>` -> the tokens; UserError where one is empty or named twice."""
    tokens = [token.strip() for token in text.split(",")]
    for i, token in enumerate(tokens):
        if not token or token in tokens[:i]:
            raise UserError(f"--new-tokens {text!r}: {token!r} is {'named twice' if token else 'no token'}")
    return tokens


def add_tokens(tokenizer: Any, tokens: list[str]) -> list[int]:
    """Let the tokenizer know `tokens`, and give their ids. UserError for one that it knows already."""
    known = tokenizer.get_vocab()
    for token in tokens:
        if token in known:
            raise UserError(f"--new-tokens: {token!r} is a token of --model already")
    tokenizer.add_tokens(tokens)
    return [int(tokenizer.convert_tokens_to_ids(token)) for token in tokens]


def with_mean_rows(weight: Tensor, num_rows: int) -> Tensor:
    """weight [V, ...] -> [num_rows, ...], the rows behind V being the mean of those before."""
    rows = weight.new_empty(num_rows, *weight.shape[1:])
    rows[: len(weight)], rows[len(weight) :] = weight, weight.float().mean(0)
    return rows


def of_vocabulary(lm: Any) -> set[int]:
    """`id`s of the parameters of a causal LM that have a row for each token."""
    ends = [lm.get_input_embeddings(), lm.get_output_embeddings()]
    return {id(p) for end in ends for p in end.parameters()}


def _line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0][:200] if lines else type(error).__name__
