"""Fine-tuning data: lines of text or chats, to token sequences with labels, and the loader that deals them to ranks.

A line is {"text": ..}, trained on as it stands with the end-of-text token behind it, or {"messages": [..]}, put into
words by the tokenizer's chat template. In a chat the loss is on what the assistant says, where that can be told: by the
template's own marks if it has them ({% generation %}), else by applying the template to the chat up to each answer,
if longer chats begin with the tokens of shorter ones.

Rank 0 makes the tokens, once, in OUT/tokens; the others read them. What a rank gets is a function of (seed, step).
"""

from __future__ import annotations

import gzip
import hashlib
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from luffy.data.loader import Sequence
from luffy.errors import UserError
from luffy.model.transformer import IGNORE_INDEX


def read_lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """(line number, object) of a .jsonl or .jsonl.gz file; UserError naming the line that is not one."""
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        yield from _read_lines(opener(path, "rt", encoding="utf-8"), path)
    except UnicodeDecodeError as error:
        raise UserError(f"--data {path} is not UTF-8 ({error.reason}); convert it, say with iconv") from error
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"--data {path} is a damaged gzip file ({error}); fetch it again") from error


def _read_lines(file: Any, path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                value = json.loads(line)
            except ValueError as error:
                raise UserError(f"--data {path}, line {number}: not a JSON object") from error
            if not isinstance(value, dict) or not ("text" in value or "messages" in value):
                raise UserError(f'--data {path}, line {number}: has neither "text" nor "messages"')
            yield number, value


def encode_text(tokenizer: Any, text: str) -> tuple[list[int], list[bool]]:
    """Tokens with the end-of-text token, all trained on."""
    ids = list(tokenizer(text)["input_ids"])
    if tokenizer.eos_token_id is not None and (not ids or ids[-1] != tokenizer.eos_token_id):
        ids.append(tokenizer.eos_token_id)
    return ids, [True] * len(ids)


def encode_chat(tokenizer: Any, messages: list[dict[str, Any]]) -> tuple[list[int], list[bool] | None]:
    """Tokens of a chat, and which of them the assistant says; None where that cannot be told."""
    if "{% generation" in (tokenizer.chat_template or "") or "{%- generation" in (tokenizer.chat_template or ""):
        out = tokenizer.apply_chat_template(messages, return_dict=True, return_assistant_tokens_mask=True)
        return list(out["input_ids"]), [bool(m) for m in out["assistant_masks"]]

    def tokens(some: list[dict[str, Any]], answer_follows: bool = False) -> list[int]:
        out = tokenizer.apply_chat_template(some, add_generation_prompt=answer_follows, return_dict=True)
        return list(out["input_ids"])

    ids = tokens(messages)
    spoken = [False] * len(ids)
    for i, message in enumerate(messages):
        if message.get("role") != "assistant":
            continue
        try:
            before, with_it = tokens(messages[:i], answer_follows=True), tokens(messages[: i + 1])
        except Exception:  # templates raise what they like for chats that they do not take, such as an empty one
            return ids, None
        if ids[: len(with_it)] != with_it or with_it[: len(before)] != before:
            return ids, None
        spoken[len(before) : len(with_it)] = [True] * (len(with_it) - len(before))
    return ids, spoken


class Examples:
    """Token sequences end to end: `tokens` int32 [N], `trained` bool [N], `starts` int64 [n + 1]."""

    def __init__(self, folder: Path) -> None:
        self.tokens, self.trained, self.starts = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False)
            for name in ("tokens", "trained", "starts")
        )

    def __len__(self) -> int:
        return len(self.starts) - 1

    def sequence(self, index: int, sequence_id: int) -> Sequence:
        """Inputs, and as labels the token that follows each, where that is trained on."""
        begin, end = int(self.starts[index]), int(self.starts[index + 1])
        tokens = np.asarray(self.tokens[begin:end], dtype=np.int64)
        labels = np.where(self.trained[begin + 1 : end], tokens[1:], IGNORE_INDEX)
        return Sequence(sequence_id, tokens[:-1], labels, True)


def prepare_examples(
    path: Path, tokenizer: Any, folder: Path, *, sequence_length: int, loss_on: str, vocab_size: int
) -> str:
    """Make `folder` of `path`, unless it is of the same file and settings. Returns a line on what was made.

    Texts longer than `sequence_length` are cut into pieces, chats at their end; what keeps no label is left out.
    """
    vocabulary = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template
    about = {
        "file": [str(path), path.stat().st_size, path.stat().st_mtime_ns],
        "settings": [sequence_length, loss_on],
        "tokenizer": hashlib.sha256(repr(vocabulary).encode()).hexdigest(),
    }
    note = folder / "about.json"
    if note.exists():
        known = json.loads(note.read_text(encoding="utf-8"))
        if {k: known.get(k) for k in about} == about:
            return str(known["summary"])
        note.unlink()
    folder.mkdir(parents=True, exist_ok=True)
    ids: list[np.ndarray] = []
    marks: list[np.ndarray] = []
    unmarked = empty = chats = 0
    for number, line in read_lines(path):
        if "messages" in line:
            chats += 1
            tokens, spoken = _chat(tokenizer, line["messages"], path, number)
            unmarked += spoken is None
            if spoken is None and loss_on == "assistant":
                raise UserError(
                    f"--loss-on assistant: {path}, line {number}: the chat template does not tell what the assistant "
                    "says; use --loss-on all, or a template with {% generation %} marks"
                )
            trained = [True] * len(tokens) if spoken is None or loss_on == "all" else spoken
            tokens, trained = tokens[: sequence_length + 1], trained[: sequence_length + 1]
        else:
            if not isinstance(line["text"], str):
                raise UserError(f'--data {path}, line {number}: "text" is not a string')
            tokens, trained = encode_text(tokenizer, line["text"])
        if tokens and max(tokens) >= vocab_size:
            raise UserError(f"--model: its tokenizer makes token {max(tokens)}, but its vocabulary has {vocab_size}")
        before = len(ids)
        for begin in range(0, len(tokens), sequence_length):
            piece, mark = (v[begin : begin + sequence_length + 1] for v in (tokens, trained))
            if len(piece) >= 2 and any(mark[1:]):
                ids.append(np.array(piece, dtype=np.int32))
                marks.append(np.array(mark, dtype=bool))
        empty += before == len(ids)
    if len(ids) < 2:
        raise UserError(f"--data {path}: {len(ids)} usable sequences; at least 2 are needed, one to be held out")
    np.save(folder / "tokens.npy", np.concatenate(ids))
    np.save(folder / "trained.npy", np.concatenate(marks))
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum([len(x) for x in ids])]))
    summary = f"{len(ids):,} sequences, {sum(len(x) for x in ids):,} tokens"
    if empty:
        summary += f"; {empty:,} lines left out: nothing to train on"
    if chats and loss_on != "all":
        summary += f"; loss on the assistant's tokens in {chats - unmarked:,} of {chats:,} chats"
    note.write_text(json.dumps(about | {"summary": summary}), encoding="utf-8")
    return summary


def _chat(tokenizer: Any, messages: Any, path: Path, number: int) -> tuple[list[int], list[bool] | None]:
    if not tokenizer.chat_template:
        raise UserError(f'--data {path}, line {number}: "messages", but the tokenizer of --model has no chat template')
    try:
        return encode_chat(tokenizer, messages)
    except Exception as error:  # templates raise what they like
        raise UserError(f"--data {path}, line {number}: the chat template refuses it: {error}") from error


class ExampleLoader:
    """Deals examples to steps and ranks, each once an epoch in an order of its own; as SequenceLoader does."""

    def __init__(self, examples: Examples, indices: np.ndarray, global_batch_size: int, seed: int) -> None:
        self.examples, self.indices, self.global_batch_size, self.seed = examples, indices, global_batch_size, seed
        self._order: tuple[int, np.ndarray] | None = None

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Sequence]:
        share = self.global_batch_size // world_size
        first = step * self.global_batch_size + rank * share
        return [self.examples.sequence(self._at(place), place) for place in range(first, first + share)]

    def _at(self, place: int) -> int:
        epoch, position = divmod(place, len(self.indices))
        if self._order is None or self._order[0] != epoch:
            self._order = epoch, np.random.default_rng((self.seed, epoch)).permutation(len(self.indices))
        return int(self.indices[self._order[1][position]])

    def eval_batches(self, num_batches: int, rank: int = 0, world_size: int = 1) -> Iterator[list[Sequence]]:
        """The same batches at every call, no example twice; places beyond the last hold a token without a label."""
        share = self.global_batch_size // world_size
        for step in range(min(num_batches, -(-len(self.indices) // self.global_batch_size))):
            first = step * self.global_batch_size + rank * share
            yield [self._held_out(place) for place in range(first, first + share)]

    def _held_out(self, place: int) -> Sequence:
        if place < len(self.indices):
            return self.examples.sequence(int(self.indices[place]), place)
        return Sequence(place, np.zeros(1, dtype=np.int64), np.full(1, IGNORE_INDEX, dtype=np.int64), True)


def held_out(num_examples: int, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Indices to train on, and at least one held out."""
    order = np.random.default_rng((seed, 0x5EED)).permutation(num_examples)
    count = min(num_examples - 1, max(1, round(num_examples * fraction)))
    return np.sort(order[count:]), order[:count]
