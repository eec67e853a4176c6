"""Texts, completions and chats to tokens, and which of them are trained on.

In a chat these are the answers (the assistant's messages), each with the end of its turn. Which tokens they are is told
by the template's own marks if it has them ({% generation %}), else by rendering the chat up to each answer, with and
without it: an answer whose tokens stand in the whole chat as they would when it was given is trained on. Templates that
drop the thoughts of earlier answers change those, so there the last answer alone is trained on.
"""

from __future__ import annotations

from itertools import groupby
from typing import Any

from luffy.hf.records import Chat, Completion, Text

Encoded = tuple[list[int], list[bool]]  # tokens, and for each whether it is trained on


def encode_text(tokenizer: Any, text: Text) -> Encoded:
    """Tokens with the end-of-text token, all trained on."""
    ids = _ended(tokenizer, list(tokenizer(text.text)["input_ids"]))
    return ids, [True] * len(ids)


def encode_completion(tokenizer: Any, pair: Completion) -> Encoded:
    """The prompt's tokens as they are when nothing follows yet, then the completion's and the end-of-text token."""
    prompt = list(tokenizer(pair.prompt)["input_ids"])
    if prompt and prompt[-1] == tokenizer.eos_token_id:
        prompt.pop()
    answer = _ended(tokenizer, list(tokenizer(pair.completion, add_special_tokens=False)["input_ids"]))
    return prompt + answer, [False] * len(prompt) + [True] * len(answer)


def _ended(tokenizer: Any, ids: list[int]) -> list[int]:
    end = tokenizer.eos_token_id
    return ids if end is None or ids[-1:] == [end] else [*ids, end]


def encode_chat(tokenizer: Any, chat: Chat) -> tuple[list[int], list[bool] | None]:
    """Tokens of a chat, and which of them are answers to train on; None where not one answer can be told."""
    messages = chat.messages

    def render(some: list[dict[str, Any]], **options: Any) -> Any:
        return tokenizer.apply_chat_template(some, tools=chat.tools, return_dict=True, **options)

    template = tokenizer.chat_template or ""
    template = template if isinstance(template, str) else "".join(template.values())
    if any(f"{{%{dash} generation" in template for dash in ("", "-", "+")):
        out = render(messages, return_assistant_tokens_mask=True)
        marked = [bool(m) for m in out["assistant_masks"]]
        if (kept := _without_untrained(marked, chat)) is not None:
            return list(out["input_ids"]), kept
    ids = list(render(messages)["input_ids"])
    spoken, told = [False] * len(ids), False
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        try:
            before = list(render(messages[:i], add_generation_prompt=True)["input_ids"])
            with_it = ids if i + 1 == len(messages) else list(render(messages[: i + 1])["input_ids"])
        except Exception:  # templates raise what they like for chats that they do not take, such as an empty one
            continue
        if ids[: len(with_it)] != with_it or with_it[: len(before)] != before:
            continue
        told = True
        if chat.trained[i]:
            spoken[len(before) : len(with_it)] = [True] * (len(with_it) - len(before))
    return ids, spoken if told or not any(chat.trained) else None


def _without_untrained(marked: list[bool], chat: Chat) -> list[bool] | None:
    """The template's marks, less the answers of weight 0; None where it marks another number of answers."""
    answers = [t for m, t in zip(chat.messages, chat.trained, strict=True) if m["role"] == "assistant"]
    if all(answers):
        return marked
    runs = [(is_marked, len(list(run))) for is_marked, run in groupby(marked)]
    if sum(is_marked for is_marked, _ in runs) != len(answers):
        return None
    wanted = iter(answers)
    return [value for is_marked, n in runs for value in [is_marked and next(wanted)] * n]
