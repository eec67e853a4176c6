"""Fine-tuning data as users have it: what each kind of record becomes, and which of its tokens are trained on."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("transformers")

from luffy.errors import UserError
from luffy.hf.encode import encode_chat, encode_text
from luffy.hf.records import Chat, Text, read_record
from luffy.hf.text import Examples, divide, prepare_examples

from .tiny import MARKED_TEMPLATE, tiny_tokenizer

CHAT = [
    {"role": "user", "content": "1+1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "sure?"},
    {"role": "assistant", "content": "yes"},
]
# Every answer but the last loses its last letter; what ends in a question is another text then, answers or not.
REWRITING = "{% for m in messages %}<{{ m.role }}>{{ m.content if loop.last else m.content[:-1] }}{% endfor %}"
# As Qwen3 does: thoughts are shown behind the last question only.
THINKING = (
    "{% set ns = namespace(last=-1) %}{% for m in messages %}{% if m.role == 'user' %}{% set ns.last = loop.index0 %}"
    "{% endif %}{% endfor %}{% for m in messages %}{{ '<' + m.role + '>' }}"
    "{% if m.role == 'assistant' and loop.index0 > ns.last %}{{ '<t></t>' }}{% endif %}{{ m.content + '<eos>' }}"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
TOOLED = (
    "{% if tools %}[{{ tools | map(attribute='name') | join(',') }}]{% endif %}{% for m in messages %}<{{ m.role }}>"
    "{% for c in m.tool_calls or [] %}{{ c.function.name }}({{ c.function.arguments.x }}){% endfor %}"
    "{{ m.content or '' }}<eos>{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def chat_of(messages: list[dict[str, Any]]) -> Chat:
    made = read_record({"messages": messages}, "--data d:1")
    assert isinstance(made, Chat)
    return made


def prepared(tmp_path: Path, lines: list[Any], template: str | None = None, **changes: Any) -> tuple[Examples, Any]:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in lines))
    tokenizer = tiny_tokenizer(template) if template else tiny_tokenizer()
    settings: dict[str, Any] = {"sequence_length": 200, "loss_on": "auto", "vocab_size": 97}
    prepare_examples(path, tokenizer, tmp_path / "t", **settings | changes)
    return Examples(tmp_path / "t"), tokenizer


def whole_and_trained(examples: Examples, tokenizer: Any, index: int = 0) -> tuple[str, str]:
    at = slice(int(examples.starts[index]), int(examples.starts[index + 1]))
    tokens = examples.tokens[at]
    return tokenizer.decode(tokens), tokenizer.decode(tokens[examples.trained[at]])


@pytest.mark.parametrize(
    ("record", "template", "whole", "trained"),
    [
        ({"messages": CHAT}, None, "<user>1+1?<eos><assistant>2<eos><user>sure?<eos><assistant>yes<eos>",
         "2<eos>yes<eos>"),
        ({"messages": CHAT}, THINKING, "<user>1+1?<eos><assistant>2<eos><user>sure?<eos><assistant><t></t>yes<eos>",
         "<t></t>yes<eos>"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}, *CHAT[2:]]}, None,
         "<user>1+1?<eos><assistant>2<eos><user>sure?<eos><assistant>yes<eos>", "yes<eos>"),
        ({"messages": [CHAT[0], CHAT[1] | {"weight": 0}, CHAT[2], CHAT[3] | {"weight": 1}]}, MARKED_TEMPLATE,
         "<user>1+1?<eos><assistant>2<eos><user>sure?<eos><assistant>yes<eos>", "yes<eos>"),
        ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"}, None,
         "<system>s<eos><user>q<eos><assistant>a<eos>", "a<eos>"),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, None,
         "<user>q<eos><assistant>a<eos>", "a<eos>"),
        ({"instruction": "do", "input": "this", "output": "done"}, None, "<user>do this<eos><assistant>done<eos>",
         "done<eos>"),
        ({"instruction": "do", "input": "", "output": "done", "history": [["p", "q"]]}, None,
         "<user>p<eos><assistant>q<eos><user>do<eos><assistant>done<eos>", "done<eos>"),
        ({"prompt": "q: ", "completion": "a"}, None, "q: a<eos>", "a<eos>"),
        ({"prompt": CHAT[:1], "completion": CHAT[1:2]}, None, "<user>1+1?<eos><assistant>2<eos>", "2<eos>"),
        ({"text": "as it is", "messages": None}, None, "as it is<eos>", "as it is<eos>"),
        ({"tools": '[{"name": "f"}]', "messages": [
            {"role": "user", "content": "q"},
            {"role": "assistant", "content": None,
             "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": '{"x": 3}'}}]},
            {"role": "tool", "content": "r"}, {"role": "assistant", "content": [{"type": "text", "text": "a"}]}]},
         TOOLED,
         "[f]<user>q<eos><assistant>f(3)<eos><tool>r<eos><assistant>a<eos>", "f(3)<eos>a<eos>"),
        ({"conversations": [{"from": "human", "value": "q"},
                            {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                            {"from": "observation", "value": "r"}, {"from": "gpt", "value": "a"}]}, TOOLED,
         "<user>q<eos><assistant>f(1)<eos><tool>r<eos><assistant>a<eos>", "f(1)<eos>a<eos>"),
    ],
)  # fmt: skip
def test_what_a_record_becomes(
    tmp_path: Path, record: dict[str, Any], template: str | None, whole: str, trained: str
) -> None:
    examples, tokenizer = prepared(tmp_path, [record] * 2, template)
    found = whole_and_trained(examples, tokenizer)
    assert (found[0].replace("<unk>", " "), found[1]) == (whole, trained)


@pytest.mark.parametrize("template", ["by prefix", "by marks"])
def test_the_loss_of_a_chat_is_on_what_the_assistant_says(template: str) -> None:
    tokenizer = tiny_tokenizer() if template == "by prefix" else tiny_tokenizer(MARKED_TEMPLATE)
    ids, spoken = encode_chat(tokenizer, chat_of(CHAT))
    assert tokenizer.decode(ids) == "<user>1+1?<eos><assistant>2<eos><user>sure?<eos><assistant>yes<eos>"
    assert spoken is not None
    assert tokenizer.decode([i for i, yes in zip(ids, spoken, strict=True) if yes]) == "2<eos>yes<eos>"


def test_prompts_are_never_trained_on_by_surprise(tmp_path: Path) -> None:
    lines = [{"messages": CHAT}, {"text": "good"}, {"text": "too"}]
    assert encode_chat(tiny_tokenizer(REWRITING), chat_of([*CHAT, CHAT[0]]))[1] is None
    lines[0] = {"messages": [*CHAT, CHAT[0]]}
    examples, tokenizer = prepared(tmp_path, lines, REWRITING)
    assert [whole_and_trained(examples, tokenizer, i)[0] for i in range(len(examples))] == ["good<eos>", "too<eos>"]
    assert "1 because the chat template does not tell" in json.loads((tmp_path / "t/about.json").read_text())["summary"]
    with pytest.raises(UserError, match=r"--loss-on assistant: .*data.jsonl:1: the chat template does not tell"):
        prepared(tmp_path, lines, REWRITING, loss_on="assistant")
    examples, tokenizer = prepared(tmp_path, lines, REWRITING, loss_on="all")
    assert len(examples) == 3 and examples.trained[: int(examples.starts[1])].all()


def test_texts_are_cut_and_chats_end(tmp_path: Path) -> None:
    tokenizer, data = tiny_tokenizer(), tmp_path / "data.jsonl"
    text = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMN"
    long_question = [{"role": "user", "content": "x" * 40}, {"role": "assistant", "content": "y"}]
    data.write_text("\n".join(json.dumps(v) for v in ({"text": text}, {"messages": CHAT}, {"messages": long_question})))
    settings: dict[str, Any] = {"sequence_length": 30, "vocab_size": 97}
    summary = prepare_examples(data, tokenizer, tmp_path / "t", loss_on="auto", **settings)
    assert "1 lines left out" in summary, "its answer lies beyond the end"
    assert "2 were longer than --sequence-length" in summary
    assert "2 of 2 chats" in summary
    examples = Examples(tmp_path / "t")
    found = [examples.sequence(i, i) for i in range(len(examples))]
    # 41 tokens with the end of the text: inputs 0..29 and 30..39, each label the token after.
    ids = encode_text(tokenizer, Text(text))[0]
    assert [s.tokens.tolist() for s in found[:2]] == [ids[:30], ids[30:40]]
    assert [s.labels.tolist() for s in found[:2]] == [ids[1:31], ids[31:41]]
    chat = found[2]
    assert tokenizer.decode(chat.tokens.tolist()) == "<user>1+1?<eos><assistant>2<eos><user>"
    assert tokenizer.decode(chat.labels[chat.labels >= 0].tolist()) == "2<eos>"
    assert chat.labels[21] == chat.tokens[22] == ord("2") - 32
    # Prepared once: the same settings are taken as they are, others are made anew.
    stamp = (tmp_path / "t" / "tokens.npy").stat().st_mtime_ns
    prepare_examples(data, tokenizer, tmp_path / "t", loss_on="auto", **settings)
    assert (tmp_path / "t" / "tokens.npy").stat().st_mtime_ns == stamp
    prepare_examples(data, tokenizer, tmp_path / "t", loss_on="all", **settings)
    assert len(Examples(tmp_path / "t")) == 4


def test_files_of_every_kind_and_what_is_held_out(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "a-train.jsonl").write_bytes(b'\xef\xbb\xbf{"text": "jsonl"}')
    with gzip.open(folder / "b-train.jsonl.gz", "wt") as f:
        f.write('{"text": "gz"}')
    # Parquet gives every message every field, null where it has none.
    chats = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "weight": 1}]]
    pq.write_table(pa.table({"messages": chats}), folder / "c-train.parquet")
    (folder / "d-test.txt").write_text("held out")
    (tmp_path / "array.json").write_text(json.dumps([{"instruction": "i", "output": "o"}]))
    (tmp_path / "lines.json").write_text('{"text": "one"}\n{"text": "two"}\n')
    tokenizer = tiny_tokenizer()
    settings: dict[str, Any] = {"sequence_length": 60, "vocab_size": 97, "loss_on": "auto"}

    def read(data: Path, **more: Any) -> tuple[list[str], Examples]:
        prepare_examples(data, tokenizer, tmp_path / "t", **settings, **more)
        examples = Examples(tmp_path / "t")
        texts = [whole_and_trained(examples, tokenizer, i)[0].replace("<unk>", " ") for i in range(len(examples))]
        return texts, examples

    texts, examples = read(folder)
    assert texts == ["jsonl<eos>", "gz<eos>", "<user>q<eos><assistant>a<eos>", "held out<eos>"]
    assert [x.tolist() for x in divide(examples, 0.5, 0)] == [[0, 1, 2], [3]], "a file named so is what is held out"
    texts, examples = read(tmp_path / "lines.json", validation=tmp_path / "array.json")
    assert texts == ["one<eos>", "two<eos>", "<user>i<eos><assistant>o<eos>"]
    assert [x.tolist() for x in divide(examples, 0.5, 0)] == [[0, 1], [2]]
    examples = read(tmp_path / "lines.json")[1]
    assert [x.tolist() for x in divide(examples, 0.0, 0)] == [[0, 1], []], "none at all"
    assert [len(x) for x in divide(examples, 0.1, 0)] == [1, 1]
    (tmp_path / "fields.jsonl").write_text('{"body": "b", "text": "t"}')
    assert read(tmp_path / "fields.jsonl", text_field="body")[0] == ["b<eos>"]
    with pytest.raises(UserError, match="valid-fraction 0"):
        divide(Examples(tmp_path / "t"), 0.1, 0)


@pytest.mark.parametrize(
    ("line", "template", "loss_on", "message"),
    [
        ("[1]", "", "auto", ":2 is a JSON array"),
        ("{", "", "auto", ":2 is not valid JSON"),
        ('{"body": "x"}', "", "auto", r':2 has no "messages", .* \(fields here: body\)'),
        ('{"text": 5}', "", "auto", ':2: "text" is not a string'),
        ('{"messages": "hello"}', "", "auto", ':2: "messages" is not a list of messages'),
        ('{"messages": [{"role": "user"}]}', "", "auto", ':2, message 1: has no "content"'),
        ('{"messages": [{"content": "x"}]}', "", "auto", ":2, message 1: is not"),
        ('{"messages": [{"role": "user", "content": "x", "weight": 0.5}]}', "", "auto", '"weight" 0.5 must be 0 or 1'),
        ('{"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}', "", "auto", "parts that are not text"),
        ('{"conversations": [{"from": "alien", "value": "x"}]}', "", "auto", "'alien' is not one of human"),
        ('{"tools": "x", "messages": []}', "", "auto", ':2: "tools" is not a list, nor the JSON text'),
        ('{"instruction": "x", "output": 3}', "", "auto", ':2: "output" is not a string'),
        (json.dumps({"messages": CHAT}), None, "auto", "no chat template"),
        (json.dumps({"messages": CHAT}), "{{ raise_exception('no') }}", "auto", ":2: the chat template refuses it"),
    ],
)  # fmt: skip
def test_a_line_that_is_wrong_is_named(
    tmp_path: Path, line: str, template: str | None, loss_on: str, message: str
) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "good"}\n' + line)
    with pytest.raises(UserError, match=message):
        prepare_examples(
            tmp_path / "data.jsonl", tiny_tokenizer(template), tmp_path / "t",
            sequence_length=8, loss_on=loss_on, vocab_size=97,
        )  # fmt: skip


def test_files_that_are_damaged(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"sequence_length": 8, "loss_on": "all", "vocab_size": 97}
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "ok"}\n{"text": "caf\xe9"}\n')
    lines = b'{"text": "ok"}\n' * 4000
    (tmp_path / "cut.jsonl.gz").write_bytes(gzip.compress(lines)[:-30])
    for name, message in (("latin.jsonl", "jsonl:2 is not UTF-8"), ("cut.jsonl.gz", "is a damaged gzip file")):
        with pytest.raises(UserError, match=message):
            prepare_examples(tmp_path / name, tiny_tokenizer(), tmp_path / "t", **settings)


def test_a_vocabulary_that_is_too_small(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text('{"text": "good"}')
    with pytest.raises(UserError, match=r"token 95, but its vocabulary has 90"):
        prepare_examples(
            tmp_path / "data.jsonl", tiny_tokenizer(), tmp_path / "t", sequence_length=8, loss_on="all", vocab_size=90
        )


def test_names_of_the_hub_are_looked_up_in_its_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from luffy.hf.hub import local_data, local_model

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for name in ("models--org--name", "datasets--org--name"):
        (tmp_path / name / "snapshots" / "abc").mkdir(parents=True)
        (tmp_path / name / "refs").mkdir()
        (tmp_path / name / "refs" / "main").write_text("abc")
    assert local_model("org/name") == str(tmp_path / "models--org--name" / "snapshots" / "abc")
    assert local_data("org/name", "--data") == str(tmp_path / "datasets--org--name" / "snapshots" / "abc")
    assert local_data("data/chats.jsonl", "--data") == "data/chats.jsonl", "a path, though it is not there"
    with pytest.raises(UserError, match=r"--data org/other is not a path here.*hf download --repo-type dataset"):
        local_data("org/other", "--data")
