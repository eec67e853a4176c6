"""Records of fine-tuning data as users have them, made into a text, a prompt with its completion, or a chat.

    {"text": ..}                                    a text (or another field, by --text-field)
    {"prompt": .., "completion": ..}                two strings, or two lists of messages
    {"messages": [{"role", "content", "weight"}]}   OpenAI's chats; "tools" beside them
    {"conversations": [{"from", "value"}]}          ShareGPT
    {"instruction", "input", "output"}              Alpaca; "system" and "history" beside them

A message's `weight` of 0 says that it is not trained on. What is missing or of another type is a UserError that names
the place and the field.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from luffy.data.formats import without_lone_surrogates
from luffy.errors import UserError

Message = dict[str, Any]

KINDS = '"messages", "conversations", "prompt" and "completion", "instruction" and "output", or "text"'
_SHAREGPT_ROLES = {
    "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "model": "assistant", "bot": "assistant", "system": "system", "tool": "tool", "observation": "tool",
    "function_response": "tool", "function_call": "assistant",
}  # fmt: skip


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Completion:
    """Two strings that stand end to end; the second is the answer."""

    prompt: str
    completion: str


@dataclass(frozen=True)
class Chat:
    """messages: as chat templates want them. trained: for each, whether it is an answer to train on."""

    messages: list[Message]
    trained: list[bool]
    tools: list[Any] | None = None


def read_record(record: dict[str, Any], where: str, text_field: str = "text") -> Text | Completion | Chat | None:
    """What a record holds; None where it holds nothing (null, or white space only). where: begins every message."""
    record = {name: value for name, value in record.items() if value is not None}
    if text_field != "text":
        return _text(record, where, text_field)
    tools = _tools(record.get("tools"), where)
    if "messages" in record:
        return _chat(record["messages"], where, "messages", tools)
    if "conversations" in record:
        return _chat(_from_sharegpt(record, where), where, "conversations", tools)
    if "prompt" in record and "completion" in record:
        prompt, completion = record["prompt"], record["completion"]
        if isinstance(prompt, list) and isinstance(completion, list):
            head, tail = (_chat(record[name], where, name, tools) for name in ("prompt", "completion"))
            return Chat(head.messages + tail.messages, [False] * len(head.messages) + tail.trained, tools)
        return Completion(*(_string(record, where, name) for name in ("prompt", "completion")))
    if "instruction" in record and "output" in record:
        return _from_alpaca(record, where)
    if "text" in record:
        return _text(record, where, "text")
    fields = ", ".join(list(record)[:8]) or "none"
    raise UserError(f"{where} has no {KINDS}, nor a field named by --text-field (fields here: {fields})")


def _text(record: dict[str, Any], where: str, field: str) -> Text | None:
    if field not in record:
        raise UserError(f"{where} has no field {field!r}: name the one that holds the text with --text-field")
    text = _string(record, where, field)
    return Text(text) if text.strip() else None


def _string(record: dict[str, Any], where: str, field: str) -> str:
    if not isinstance(record[field], str):
        raise UserError(f'{where}: "{field}" is not a string')
    return without_lone_surrogates(record[field])


def _tools(value: Any, where: str) -> list[Any] | None:
    """A list, or the JSON text of one, as some data sets store it; an empty one is none."""
    if isinstance(value, str) and value.strip():
        try:
            value = json.loads(value)
        except ValueError as error:
            raise UserError(f'{where}: "tools" is not a list, nor the JSON text of one') from error
    if value and not isinstance(value, list):
        raise UserError(f'{where}: "tools" is not a list')
    return value or None


def _chat(messages: Any, where: str, field: str, tools: list[Any] | None) -> Chat:
    if not isinstance(messages, list) or not messages:
        raise UserError(f'{where}: "{field}" is not a list of messages')
    made, trained = [], []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f'{place}: is not {{"role": .., "content": ..}}')
        weight = message.get("weight", 1)
        if weight not in (None, 0, 1):
            raise UserError(f'{place}: "weight" {weight} must be 0 or 1')
        kept = {name: value for name, value in message.items() if value is not None and name != "weight"}
        if "content" in kept:
            kept["content"] = _content(kept["content"], place)
        elif not kept.get("tool_calls"):
            raise UserError(f'{place}: has no "content"')
        if kept.get("tool_calls"):
            kept["tool_calls"] = [_tool_call(call, place) for call in kept["tool_calls"]]
        made.append(kept)
        trained.append(kept["role"] == "assistant" and weight != 0)
    return Chat(made, trained, tools)


def _content(content: Any, place: str) -> str:
    """A string, or a list of parts that are all text."""
    if isinstance(content, list):
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
            raise UserError(f'{place}: "content" has parts that are not text')
        content = "".join(p["text"] for p in content)
    if not isinstance(content, str):
        raise UserError(f'{place}: "content" is not a string')
    return without_lone_surrogates(content)


def _tool_call(call: Any, place: str) -> dict[str, Any]:
    """OpenAI's calls hold their arguments as JSON text, templates want them as objects."""
    if not isinstance(call, dict):
        raise UserError(f'{place}: "tool_calls" are not objects')
    function = call.get("function", call)
    arguments = function.get("arguments") if isinstance(function, dict) else None
    if not isinstance(arguments, str):
        return call
    try:
        function = function | {"arguments": json.loads(arguments)}
    except ValueError:
        return call
    return call | {"function": function} if "function" in call else function


def _from_sharegpt(record: dict[str, Any], where: str) -> Any:
    turns = record["conversations"]
    if not isinstance(turns, list):
        return turns
    system = record.get("system")
    messages: list[Any] = [{"role": "system", "content": system}] if system else []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "from" not in turn:
            messages.append(turn)  # in OpenAI's manner after all, or wrong: `_chat` tells
            continue
        role = _SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            known = ", ".join(_SHAREGPT_ROLES)
            raise UserError(f'{where}, message {number}: "from" {turn["from"]!r} is not one of {known}')
        message = {"role": role, "content": turn.get("value"), "weight": turn.get("weight")}
        if turn["from"] == "function_call":
            try:
                call = {"type": "function", "function": json.loads(str(message.pop("content")))}
            except (ValueError, TypeError) as error:
                raise UserError(f'{where}, message {number}: "value" of a function_call is not JSON') from error
            message["tool_calls"] = [call]
        messages.append(message)
    return messages


def _from_alpaca(record: dict[str, Any], where: str) -> Chat:
    """The instruction and, on a line of its own, the input: what the user says. Earlier turns are not trained on."""
    said = [_string(record, where, name) for name in ("instruction", "input") if record.get(name)]
    messages: list[Message] = [{"role": "system", "content": record["system"]}] if record.get("system") else []
    for turn in record.get("history") or []:
        if not isinstance(turn, list) or len(turn) != 2:
            raise UserError(f'{where}: "history" is not a list of [question, answer]')
        messages += [{"role": "user", "content": turn[0]}, {"role": "assistant", "content": turn[1], "weight": 0}]
    messages.append({"role": "user", "content": "\n".join(said)})
    messages.append({"role": "assistant", "content": _string(record, where, "output")})
    return _chat(messages, where, "history", None)
