"""Fine-tuning data: files of records (luffy.hf.records) to token sequences with labels, and the loader that deals them.

Files are found and read as `luffy train` does it (luffy.data): a file or a folder of .jsonl, .jsonl.gz, .json, .parquet
or .txt, files named valid or test being held out. Texts longer than a sequence are cut into pieces, chats and
completions at their end; what keeps nothing to train on is left out and counted.

Rank 0 makes the tokens, once, in OUT/tokens; the others read them. What a rank gets is a function of (seed, step).
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from luffy.data.corpus import list_source_files
from luffy.data.formats import read_records
from luffy.data.loader import Sequence
from luffy.errors import UserError
from luffy.hf.encode import Encoded, encode_chat, encode_completion, encode_text
from luffy.hf.records import Chat, Text, read_record
from luffy.model.transformer import IGNORE_INDEX


class Examples:
    """Token sequences end to end: `tokens` int32 [N], `trained` bool [N], `starts` int64 [n + 1].

    held_out: bool [n], of files that are named so, or given as --validation.
    """

    def __init__(self, folder: Path) -> None:
        names = ("tokens", "trained", "starts", "held_out")
        self.tokens, self.trained, self.starts, self.held_out = (
            np.load(folder / f"{name}.npy", mmap_mode="r", allow_pickle=False) for name in names
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
    path: Path | str,
    tokenizer: Any,
    folder: Path,
    *,
    sequence_length: int,
    loss_on: str,
    vocab_size: int,
    validation: Path | str | None = None,
    text_field: str = "text",
) -> str:
    """Make `folder` of `path`, unless it is of the same files and settings. Returns a line on what was made.

    loss_on: "auto" and "assistant" train on the answers of chats and completions, "all" on prompts too. Where not one
    answer of a chat can be told, "auto" leaves the chat out, and "assistant" raises UserError.
    """
    files = [(file, file.split == "valid") for file in list_source_files(path)]
    if validation is not None:
        files += [(file, True) for file in list_source_files(validation)]
    vocabulary = sorted(tokenizer.get_vocab().items()), tokenizer.chat_template
    about = {
        "files": [[str(f.path), f.num_bytes, f.mtime_ns, held] for f, held in files],
        "settings": [sequence_length, loss_on, text_field],
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
    held_out: list[bool] = []
    tally: Counter[str] = Counter()
    for file, held in files:
        for where, record in read_records(file.path):
            before = len(ids)
            for piece, mark in _pieces(tokenizer, record, where, tally, sequence_length, loss_on, text_field):
                if max(piece, default=0) >= vocab_size:
                    raise UserError(
                        f"--model: its tokenizer makes token {max(piece)}, but its vocabulary has {vocab_size}"
                    )
                if len(piece) >= 2 and any(mark[1:]):
                    ids.append(np.array(piece, dtype=np.int32))
                    marks.append(np.array(mark, dtype=bool))
            held_out += [held] * (len(ids) - before)
            tally["left out"] += before == len(ids)
    if len(ids) - sum(held_out) < 1:
        raise UserError(f"--data {path}: no usable sequence{_remarks(tally, loss_on)}")
    np.save(folder / "tokens.npy", np.concatenate(ids))
    np.save(folder / "trained.npy", np.concatenate(marks))
    np.save(folder / "starts.npy", np.concatenate([[0], np.cumsum([len(x) for x in ids])]))
    np.save(folder / "held_out.npy", np.array(held_out, dtype=bool))
    summary = f"{len(ids):,} sequences, {sum(len(x) for x in ids):,} tokens{_remarks(tally, loss_on)}"
    note.write_text(json.dumps(about | {"summary": summary}), encoding="utf-8")
    return summary


def _pieces(
    tokenizer: Any,
    record: dict[str, Any],
    where: str,
    tally: Counter[str],
    sequence_length: int,
    loss_on: str,
    text_field: str,
) -> Iterator[Encoded]:
    """What one record gives, each of sequence_length + 1 tokens at most."""
    content = read_record(record, where, text_field)
    if content is None:
        return
    if isinstance(content, Text):
        tokens, trained = encode_text(tokenizer, content)
        for begin in range(0, len(tokens), sequence_length):
            yield tokens[begin : begin + sequence_length + 1], trained[begin : begin + sequence_length + 1]
        return
    if isinstance(content, Chat):
        tally["chats"] += 1
        tokens, answers = _encode_chat(tokenizer, content, where, loss_on)
        if answers is None and loss_on != "all":
            tally["unclear"] += 1
            return
        trained = [True] * len(tokens) if answers is None or loss_on == "all" else answers
    else:
        tokens, trained = encode_completion(tokenizer, content)
        trained = [True] * len(tokens) if loss_on == "all" else trained
    tally["cut"] += len(tokens) > sequence_length + 1
    yield tokens[: sequence_length + 1], trained[: sequence_length + 1]


def _encode_chat(tokenizer: Any, chat: Chat, where: str, loss_on: str) -> tuple[list[int], list[bool] | None]:
    if not tokenizer.chat_template:
        raise UserError(f"{where}: a chat, but the tokenizer of --model has no chat template")
    try:
        tokens, answers = encode_chat(tokenizer, chat)
    except Exception as error:  # templates raise what they like
        raise UserError(f"{where}: the chat template refuses it: {error}") from error
    if answers is None and loss_on == "assistant":
        raise UserError(
            f"--loss-on assistant: {where.removeprefix('--data ')}: the chat template does not tell what the assistant "
            "says; use --loss-on all, or a template with {% generation %} marks"
        )
    return tokens, answers


def _remarks(tally: Counter[str], loss_on: str) -> str:
    out = ""
    if tally["cut"]:
        out += f"; {tally['cut']:,} were longer than --sequence-length and cut"
    if tally["left out"]:
        out += f"; {tally['left out']:,} lines left out: nothing to train on"
    if tally["unclear"]:
        out += f" ({tally['unclear']:,} because the chat template does not tell the answers; see --loss-on)"
    if tally["chats"] and loss_on != "all":
        out += f"; loss on the assistant's tokens in {tally['chats'] - tally['unclear']:,} of {tally['chats']:,} chats"
    return out


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
    """Indices to train on, and those held out: at least one, none with `fraction` 0."""
    order = np.random.default_rng((seed, 0x5EED)).permutation(num_examples)
    count = min(num_examples - 1, max(1, round(num_examples * fraction))) if fraction else 0
    return np.sort(order[count:]), order[:count]


def divide(examples: Examples, fraction: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """As `held_out`, unless files say which sequences are held out. UserError where none is left to hold out."""
    if examples.held_out.any():
        return np.flatnonzero(~examples.held_out), np.flatnonzero(examples.held_out)
    if fraction and len(examples) < 2:
        raise UserError("--data: 1 usable sequence, which cannot be held out too; give --valid-fraction 0")
    return held_out(len(examples), fraction, seed)
