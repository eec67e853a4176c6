"""Does `luffy finetune` learn? A small Mixtral from nothing but its configuration: first text, then questions.

    python benchmarks/finetune.py --data TEXTS.jsonl.gz --work runs/finetune-curve

1. MODEL: a Mixtral of random weights (4 layers x 128, 8 experts, top-2) and a byte-level tokenizer of 2048 tokens,
   trained on the texts. Nothing comes from a hub.
2. `luffy finetune` on the texts (a .jsonl of {"text": ..}), every weight.
3. `luffy finetune` of what that left on chats: a function of Python's standard library is named with its signature, the
   answer is the first paragraph of its docstring; the loss is on the answer alone.

Each run stops after --minutes at the latest; the learning rate is planned for --steps. Held out are 2% of the pieces
(texts are cut into pieces of 128 tokens, so neighbours of a held-out piece may be trained on). The figure and the
numbers: docs/figures/finetune.png, docs/results/finetune.json, where held_out_before and held_out_after are what plain
transformers computes of the folders that went in and came out.
"""

from __future__ import annotations

import ast
import gzip
import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import click
import torch
from matplotlib.figure import Figure

from luffy.report import style
from luffy.train.metrics import describe_machine, read_metrics, write_json_atomic

LENGTH, RANKS, BATCH = 128, 2, 16
TEMPLATE = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def texts_of(path: Path) -> list[str]:
    opener: Any = gzip.open if path.suffix == ".gz" else open
    with opener(path, "rt", encoding="utf-8") as f:
        return [json.loads(line)["text"] for line in f if line.strip()]


def questions() -> list[dict[str, Any]]:
    """A chat for each documented function of the standard library, in order of file and line."""
    root, out, seen = Path(sysconfig.get_paths()["stdlib"]), [], set()
    for path in sorted(root.rglob("*.py")):
        if "site-packages" in path.parts or "test" in path.parts or "idlelib" in path.parts:
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if not isinstance(node, ast.FunctionDef) or not (doc := ast.get_docstring(node)):
                continue
            question = f"{path.stem}.{node.name}({ast.unparse(node.args)})"
            answer = " ".join(doc.split("\n\n")[0].split())
            # Each answer once: overridden methods repeat theirs, and one of them might be held out.
            if len(question) < 120 and 20 < len(answer) < 300 and answer not in seen:
                seen.add(answer)
                said = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                out.append({"messages": said})
    return out


SIZES: dict[str, int] = {"vocab_size": 2048, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 4}


def make_model(folder: Path, texts: list[str], **sizes: int) -> None:
    """A folder as `save_pretrained` writes it: random weights of seed 0, and a tokenizer that read `texts`.

    sizes: in place of those of SIZES.
    """
    sizes = SIZES | sizes
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import MixtralConfig, MixtralForCausalLM, PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|end|>", "<|user|>", "<|assistant|>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=sizes["vocab_size"], special_tokens=special, initial_alphabet=alphabet)
    tokenizer.train_from_iterator(texts, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")
    fast.chat_template = TEMPLATE
    torch.manual_seed(0)
    model = MixtralForCausalLM(
        MixtralConfig(
            **sizes, num_attention_heads=4, num_key_value_heads=2,
            num_local_experts=8, num_experts_per_tok=2, max_position_embeddings=LENGTH,
            output_router_logits=True, router_aux_loss_coef=0.01, tie_word_embeddings=False,
            bos_token_id=None, eos_token_id=0, pad_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    fast.save_pretrained(folder)


def finetune(model: Path, data: Path, out: Path, steps: int, lr: float, minutes: float) -> list[str]:
    """Run the command line; what was run. Resumed or left as it is if it was run before."""
    command = [
        "luffy", "finetune", "--model", str(model), "--data", str(data), "--ranks", str(RANKS), "--steps", str(steps),
        "--batch-size", str(BATCH), "--sequence-length", str(LENGTH), "--lr", str(lr), "--eval-every", "25",
        "--checkpoint-every", "50", "--device", "cpu", "--no-tensorboard", "--resume", "--out", str(out),
    ]  # fmt: skip
    subprocess.run([sys.executable, "-m", "luffy.train.cli", *command[1:]], check=True, timeout=60 * minutes)
    return command


def curve(out: Path) -> dict[str, Any]:
    records = read_metrics(out / "metrics.jsonl")
    held = [[r["step"], r["valid_loss"]] for r in records if r.get("valid_loss") is not None]
    return {
        "steps": len(records),
        "tokens": sum(r["tokens"] for r in records),
        "loss": [r["loss"] for r in records],
        "held_out": held,
    }


def in_transformers(folder: Path, tokens: Path, most: int = 8 * BATCH) -> float:
    """Held-out loss of a folder as plain transformers computes it in one process. most: sequences that count."""
    from transformers import AutoModelForCausalLM

    from luffy.hf.text import Examples, divide

    model, examples, total, labels = AutoModelForCausalLM.from_pretrained(folder).eval(), Examples(tokens), 0.0, 0
    for i in divide(examples, 0.02, 0)[1][:most]:
        s = examples.sequence(int(i), 0)
        with torch.no_grad():
            logits = model(torch.from_numpy(s.tokens)[None]).logits[0]
        total += float(torch.nn.functional.cross_entropy(logits, torch.from_numpy(s.labels), reduction="sum"))
        labels += int((s.labels >= 0).sum())
    return total / labels


def draw(results: dict[str, Any]) -> Any:
    figure = Figure(figsize=(8.8, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for axes, key, title in ((left, "text", "Text, from random weights"), (right, "chats", "Then questions")):
        run = results[key]
        axes.plot(range(1, run["steps"] + 1), run["loss"], color=style.PALE_BLUE, linewidth=0.8, label="training")
        points = [[0, run["held_out_before"]], *run["held_out"]]
        axes.plot(*zip(*points, strict=True), color=style.BLUE, marker="o", markersize=3, label="held out")
        style.titles(axes, title, f"held out {points[0][1]:.2f} -> {points[-1][1]:.2f} nats per token")
        axes.set(xlabel="optimizer step", ylabel="cross-entropy (nats per token)")
        axes.legend()
    return figure


@click.command()
@click.option("--data", required=True, type=click.Path(path_type=Path, exists=True), help="Texts, .jsonl[.gz].")
@click.option("--work", required=True, type=click.Path(path_type=Path), help="Folder for models and runs.")
@click.option("--steps", default=250, show_default=True, help="Of each run.")
@click.option("--minutes", default=30.0, show_default=True, help="Most that each run may take.")
@click.option("--out", default="docs/results/finetune.json", show_default=True, type=click.Path(path_type=Path))
@click.option("--figure", default="docs/figures/finetune.png", show_default=True, type=click.Path(path_type=Path))
def main(data: Path, work: Path, steps: int, minutes: float, out: Path, figure: Path) -> None:
    """Both runs, their figure and their numbers."""
    model, chats = work / "model", work / "chats.jsonl"
    work.mkdir(parents=True, exist_ok=True)
    if not (model / "config.json").exists():
        make_model(model, texts_of(data))
    chats.write_text("\n".join(json.dumps(q) for q in questions()), encoding="utf-8")
    results: dict[str, Any] = {"provenance": "measured", "environment": describe_machine("cpu"), "ranks": RANKS}
    start = model
    for key, lines, lr in (("text", data, 2e-3), ("chats", chats, 1e-3)):
        command = finetune(start, lines, work / key, steps, lr, minutes)
        shown = " ".join(command).replace(str(work), "WORK").replace(str(data), "TEXTS")
        first, last = (in_transformers(m, work / key / "tokens") for m in (start, work / key / "model"))
        results[key] = {"command": shown, "held_out_before": first, "held_out_after": last, **curve(work / key)}
        start = work / key / "model"
    write_json_atomic(out, results)
    figure.parent.mkdir(parents=True, exist_ok=True)
    style.save_png(figure, style.draw(lambda: draw(results))[0])
    click.echo(
        json.dumps({k: [results[k]["held_out_before"], results[k]["held_out_after"]] for k in ("text", "chats")})
    )


if __name__ == "__main__":
    main()
