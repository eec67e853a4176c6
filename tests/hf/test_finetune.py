"""`luffy finetune`: data, a whole run, its resumption, and the folder at its end, which plain transformers judges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, AutoTokenizer

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf.finetune import FineTuner
from luffy.hf.options import FinetuneOptions
from luffy.hf.text import Examples, held_out
from luffy.testing import RankFailedError, run_ranks
from luffy.train.cli import main

from .tiny import tiny_config, tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("finetune")
    tiny_model(tiny_config("mixtral", vocab_size=97), torch.float32).save_pretrained(root / "model")
    tiny_tokenizer().save_pretrained(root / "model")
    lines: list[dict[str, Any]] = []
    for i in range(24):
        lines.append(
            {"messages": [{"role": "user", "content": f"{i}+1?"}, {"role": "assistant", "content": f"{i + 1}"}]}
        )
        lines.append({"text": f"after {i} comes {i + 1}" + "." * (i % 5)})
    (root / "data.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    return root


def options(folder: Path, **changes: Any) -> FinetuneOptions:
    base = FinetuneOptions(
        model=str(folder / "model"), data=str(folder / "data.jsonl"), ranks=2, steps=6, batch_size=8, lr=3e-3,
        device="cpu", eval_every=3, checkpoint_every=3, tensorboard=False, profile_attention=False,
        valid_fraction=0.2, sequence_length=24, rehome_every=2, out=str(folder / "out"),
    )  # fmt: skip
    return replace(base, **changes)


# ---------------------------------------------------------------- runs


def train(rank: int, runs: list[FinetuneOptions]) -> None:
    mesh = build_mesh(torch.device("cpu"))
    for run in runs:
        Path(run.out).mkdir(parents=True, exist_ok=True)
        FineTuner(run, mesh).run()


def records(out: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def plain_loss(model: Any, examples: Examples, indices: Any) -> float:
    """Mean over the labels of some examples, one after the other."""
    total, labels = 0.0, 0
    for i in indices:
        s = examples.sequence(int(i), 0)
        with torch.no_grad():
            logits = model(torch.from_numpy(s.tokens)[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(s.labels), reduction="sum"))
        labels += int((s.labels >= 0).sum())
    return total / labels


def plain_norm(folder: Path, examples: Examples, indices: Any) -> float:
    """Norm of the gradient of the mean over the labels of some examples."""
    model, labels = opened(folder), 0
    for i in indices:
        s = examples.sequence(int(i), 0)
        logits = model(torch.from_numpy(s.tokens)[None]).logits[0]
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(s.labels), reduction="sum").backward()
        labels += int((s.labels >= 0).sum())
    norms = [p.grad.norm() for p in model.parameters() if p.grad is not None]
    return float(torch.stack(norms).norm()) / labels


def changed(one: Any, other: Any) -> set[str]:
    """Names of the weights that differ."""
    state = other.state_dict()
    return {name for name, weight in one.state_dict().items() if not torch.equal(weight, state[name])}


def opened(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def test_a_run_its_resumption_and_what_it_leaves(folder: Path) -> None:
    whole, halves, lora = folder / "whole", folder / "halves", folder / "lora"
    runs = [
        options(folder, out=str(whole)),
        options(folder, out=str(halves)),  # stopped after 3 steps by removing what came later, below
        options(folder, out=str(lora), lora=3, steps=4, lr=3e-2, lora_on="attention,experts,router"),
        options(folder, out=str(folder / "frozen"), steps=2, freeze="router,layers 0-1", valid_fraction=0.0),
    ]
    run_ranks(train, 2, runs)

    history = records(whole)
    assert [r["step"] for r in history] == [1, 2, 3, 4, 5, 6]
    summary = json.loads((whole / "summary.json").read_text())
    examples = Examples(whole / "tokens")
    training, validation = held_out(len(examples), 0.2, 0)
    # The first step's loss and the last evaluation are what plain transformers says of the folders before and after.
    order = np.random.default_rng((0, 0)).permutation(len(training))[:8]
    first = plain_loss(opened(folder / "model"), examples, training[order])
    assert history[0]["loss"] == pytest.approx(first, rel=1e-5)
    assert history[0]["grad_norm"] == pytest.approx(plain_norm(folder / "model", examples, training[order]), rel=1e-4)
    after = opened(whole / "model")
    assert summary["valid_loss"] == pytest.approx(plain_loss(after, examples, validation), rel=1e-5)
    assert summary["valid_loss"] < plain_loss(opened(folder / "model"), examples, validation) - 0.1
    assert any(r["bytes"]["experts"] > 0 or r.get("rehoming") for r in history), "re-homing was asked for"
    tokenizer_files = {p.name for p in (whole / "model").iterdir()}
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "config.json"} <= tokenizer_files

    # Adapters: the frozen weights are as they were, and the merged folder is the old model with the adapter.
    from peft import PeftModel

    old, merged = opened(folder / "model"), opened(lora / "model")
    old_names = set(old.state_dict())
    parts = [f"self_attn.{p}_proj.weight" for p in "qkvo"]
    parts += ["mlp.gate.weight", "mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert changed(old, merged) == {f"model.layers.{i}.{part}" for i in range(3) for part in parts}
    ids = torch.arange(30)[None]
    adapted = PeftModel.from_pretrained(old, str(lora / "adapter"))
    assert torch.allclose(adapted(ids).logits, merged(ids).logits, atol=1e-4)
    assert records(lora)[-1]["loss"] < records(lora)[0]["loss"]

    # What is frozen stays, and with nothing held out there is no evaluation.
    names = changed(opened(folder / "model"), opened(folder / "frozen" / "model"))
    assert {n for n in old_names if ".layers.2." in n and ".gate." not in n} < names
    assert not any(".layers.0." in n or ".layers.1." in n or ".gate." in n for n in names)
    assert not any("valid_loss" in r for r in records(folder / "frozen"))

    # Killed between step 3 and step 6, and resumed: bit for bit what the uninterrupted run wrote.
    latest = halves / "checkpoints" / "step-00000006"
    for path in [*latest.iterdir()]:
        path.unlink()
    latest.rmdir()
    run_ranks(train, 2, [options(folder, out=str(halves), resume=True)])
    assert [(r["step"], r["loss"]) for r in records(halves)] == [(r["step"], r["loss"]) for r in history]
    one, other = opened(halves / "model").state_dict(), after.state_dict()
    assert all(torch.equal(one[n], other[n]) for n in other)


def test_new_tokens_get_rows_and_learn(folder: Path) -> None:
    """Of a run in full, of one with adapters, and of one whose embedding is divided."""
    chats = [{"messages": [{"role": "user", "content": "1?"}, {"role": "assistant", "content": f"<think>{i}</think>"}]}
             for i in range(12)]  # fmt: skip
    data = folder / "thoughts.jsonl"
    data.write_text("\n".join(json.dumps(chat) for chat in chats))
    changes: dict[str, Any] = {"data": str(data), "new_tokens": "<think>, </think>", "steps": 2, "checkpoint_every": 1}
    whole, lora, cut = (folder / f"new-{name}" for name in ("whole", "lora", "cut"))
    runs = [options(folder, out=str(whole), **changes), options(folder, out=str(cut), dense="sharded", **changes),
            options(folder, out=str(lora), lora=2, lr=3e-2, **changes)]  # fmt: skip
    run_ranks(train, 2, runs)

    base = opened(folder / "model")
    base.resize_token_embeddings(99)
    for weight in (base.model.embed_tokens.weight.data, base.lm_head.weight.data):
        mean = weight[:97].mean(0)
        assert torch.allclose(weight[97:], mean.expand(2, 32), atol=1e-4), "transformers' own begin as the mean too"
        weight[97:] = mean  # without its noise
    examples, (training, _) = Examples(whole / "tokens"), held_out(12, 0.2, 0)
    order = np.random.default_rng((0, 0)).permutation(len(training))[:8]
    assert {97, 98} <= set(np.asarray(examples.tokens).tolist())
    for out in (whole, cut, lora):
        assert records(out)[0]["loss"] == pytest.approx(plain_loss(base, examples, training[order]), rel=1e-5)
        tokenizer, model = AutoTokenizer.from_pretrained(out / "model"), opened(out / "model")
        assert tokenizer("a<think>")["input_ids"] == [65, 97] and tokenizer.chat_template
        assert model.config.vocab_size == 99 == len(tokenizer)
        for name in ("model.embed_tokens.weight", "lm_head.weight"):
            old, new = base.state_dict()[name], model.state_dict()[name]
            assert new.shape == (99, 32) and not torch.allclose(old[97:], new[97:], atol=1e-4)
            assert torch.equal(old[:97], new[:97]) == (out == lora)
    for a, b in zip(records(whole), records(cut), strict=True):
        assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)

    from peft import PeftModel

    adapted, ids = PeftModel.from_pretrained(base, str(lora / "adapter")), torch.arange(70, 99)[None]
    assert torch.allclose(adapted(ids).logits, opened(lora / "model")(ids).logits, atol=1e-4)
    assert AutoTokenizer.from_pretrained(lora / "adapter")("<think>")["input_ids"] == [97]

    shutil.rmtree(whole / "checkpoints" / "step-00000002")
    before = records(whole)
    run_ranks(train, 2, [options(folder, out=str(whole), resume=True, **changes)])
    assert [r["loss"] for r in records(whole)] == [r["loss"] for r in before]


def test_new_tokens_that_cannot_be(folder: Path, tmp_path: Path) -> None:
    for tokens, words in (("<a>,<a>", "'<a>' is named twice"), ("<a>,", "'' is no token")):
        with pytest.raises(UserError, match=f"--new-tokens .*{words}"):
            options(folder, new_tokens=tokens)
    with pytest.raises(UserError, match=r"--new-tokens with --lora .*--dense sharded"):
        options(folder, new_tokens="<a>", lora=2, dense="sharded")
    known = options(folder, new_tokens="<eos>", out=str(tmp_path / "out"))
    with pytest.raises(RankFailedError, match="--new-tokens: '<eos>' is a token of --model already"):
        run_ranks(train, 1, [known])


@pytest.mark.slow
def test_sharded_dense_weights_train_resume_and_leave_the_same(folder: Path) -> None:
    names = ("kept", "cut", "kept_lora", "cut_lora")
    lora: dict[str, Any] = {"lora": 3, "lr": 3e-2, "steps": 3}
    base = {"kept": {}, "cut": {"dense": "sharded"}, "kept_lora": lora, "cut_lora": {**lora, "dense": "sharded"}}
    runs = {n: options(folder, out=str(folder / n), profile_attention=False, **base[n]) for n in names}
    run_ranks(train, 2, list(runs.values()))
    for kept, cut in (("kept", "cut"), ("kept_lora", "cut_lora")):
        for a, b in zip(records(folder / kept), records(folder / cut), strict=True):
            assert b["loss"] == pytest.approx(a["loss"], rel=1e-4)
            assert b["grad_norm"] == pytest.approx(a["grad_norm"], rel=1e-3)
        one, other = (opened(folder / n / "model").state_dict() for n in (kept, cut))
        assert one.keys() == other.keys()
        for name in one:
            assert torch.allclose(one[name], other[name], rtol=1e-3, atol=1e-4), name

    # Stopped after step 3 and resumed: as it was, whole again, and on another number of ranks.
    before = records(folder / "cut")
    for changes, ranks in (({"dense": "sharded"}, 2), ({"dense": "replicated"}, 2), ({"dense": "sharded"}, 4)):
        shutil.rmtree(folder / "cut" / "checkpoints" / "step-00000006")
        again = options(folder, out=str(folder / "cut"), resume=True, ranks=ranks, **changes)
        run_ranks(train, ranks, [again])
        exact = 0 if changes["dense"] == "sharded" and ranks == 2 else 1e-4
        losses = [r["loss"] for r in records(folder / "cut")]
        assert losses == pytest.approx([r["loss"] for r in before], rel=exact, abs=0)
        assert len(losses) == 6


def use_wrong_tokenizer(rank: int, run: FinetuneOptions) -> None:
    Path(run.out).mkdir(parents=True, exist_ok=True)
    FineTuner(run, build_mesh(torch.device("cpu")))


def test_a_model_without_tokenizer_stops_all_ranks(folder: Path, tmp_path: Path) -> None:
    tiny_model(tiny_config("olmoe", vocab_size=97), torch.float32).save_pretrained(tmp_path / "bare")
    with pytest.raises(RankFailedError, match="holds no tokenizer"):
        run_ranks(use_wrong_tokenizer, 2, options(folder, model=str(tmp_path / "bare"), out=str(tmp_path / "out")))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--data", "d.jsonl"], "--model is missing"),
        (["--model", "nowhere", "--data", "d.jsonl"], "--model nowhere is not a folder"),
        (["--model", "{model}", "--data", "d.txt"], "--data d.txt does not exist"),
        (["--model", "{model}", "--data", "{model}/chat_template.jinja"], "is of no known format"),
        (["--model", "{model}", "--data", "{data}", "--validation", "d.jsonl"], "--validation d.jsonl does not exist"),
        (["--model", "{model}", "--data", "{data}", "--valid-fraction", "1"], "--valid-fraction 1"),
        (["--model", "nobody/nothing", "--data", "{data}"], "run `hf download nobody/nothing`"),
        (["--model", "{model}", "--data", "nobody/nothing"], "run `hf download --repo-type dataset nobody/nothing`"),
        (["--model", "{model}", "--data", "{data}", "--ranks", "3"], "cannot be divided over 3"),
        (["--model", "{model}", "--data", "{data}", "--sequence-length", "65"], "--sequence-length 65 is more than"),
        (["--model", "{model}", "--data", "{data}", "--dense", "split"], "--dense"),
        (
            ["--model", "{model}", "--data", "{data}", "--dense", "sharded", "--gradient-dtype", "bfloat16"],
            "cannot be combined with --dense sharded",
        ),
        (
            ["--model", "{model}", "--data", "{data}", "--lora", "2", "--lora-on", "heads"],
            "--lora-on heads: name some of",
        ),
        (["--model", "{model}", "--data", "{data}", "--dora"], "--lora-on and --dora need --lora"),
        (["--model", "{model}", "--data", "{data}", "--freeze", "gates"], "--freeze 'gates': name some of router"),
        (["--model", "{empty}", "--data", "{data}"], "config.json cannot be read"),
    ],
)
def test_the_command_line_says_what_is_wrong(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    message: str,
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    paths = {"model": folder / "model", "data": folder / "data.jsonl", "empty": tmp_path}
    with pytest.raises(SystemExit) as left:
        main(["finetune", "--out", str(tmp_path / "out"), *(a.format(**paths) for a in arguments)])
    assert left.value.code == 2
    assert message in capsys.readouterr().err


def test_other_commands_do_not_wait_for_transformers() -> None:
    check = "import sys, luffy.train.cli; sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.slow
def test_the_command_line_runs(folder: Path, tmp_path: Path) -> None:
    main(
        ["finetune", "--model", str(folder / "model"), "--data", str(folder / "data.jsonl"), "--ranks", "2", "--steps",
         "2", "--device", "cpu", "--out", str(tmp_path / "out"), "--dtype", "bfloat16", "--lora", "2", "--lr", "1e-2",
         "--new-tokens", "<x>"]
    )  # fmt: skip
    assert (tmp_path / "out" / "report.html").exists()
    assert opened(tmp_path / "out" / "model").config.model_type == "mixtral"
