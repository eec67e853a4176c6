"""Does training learn? A run's held-out loss beside that of a unigram model of the same tokens.

    luffy train --data FOLDER --out RUN ...
    python benchmarks/learning_curve.py --run RUN --out runs/learning_curve.png

The unigram model knows how often each token occurs in the training split (add-one smoothed) and nothing else: what a
model reaches before it looks at a single neighbour.
"""

import json
from pathlib import Path

import click
import numpy as np
from matplotlib.figure import Figure

from luffy.data import TokenSplit, prepare_corpus
from luffy.train.metrics import read_metrics


def token_counts(split: TokenSplit, vocab_size: int) -> np.ndarray:
    """Occurrences of each token, int64 [vocab_size]."""
    counts = np.zeros(vocab_size, dtype=np.int64)
    for i in range(split.num_documents):
        counts += np.bincount(split.document(i), minlength=vocab_size)
    return counts


@click.command()
@click.option("--run", required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--data", default=None, help="Where the data lies now, if it has moved since the run.")
def main(run: Path, out: Path, data: str | None) -> None:
    """Draw the curve and print both losses as JSON."""
    config = json.loads((run / "config.json").read_text())
    o = config["options"]
    corpus = prepare_corpus(
        data or o["data"],
        text_field=o["text_field"],
        tokenizer=o["tokenizer"],
        vocab_size=o["vocab_size"] or config["model"]["vocab_size"],
        cache_dir=o["cache_dir"],
        valid_fraction=o["valid_fraction"],
    )
    train, valid = (token_counts(s, corpus.vocab_size) for s in (corpus.train, corpus.valid))
    log_probability = np.log((train + 1) / (train + 1).sum())
    unigram = float(-(valid * log_probability).sum() / valid.sum())

    records = read_metrics(run / "metrics.jsonl")
    summary = json.loads((run / "summary.json").read_text())
    seen = np.cumsum([r["tokens"] for r in records]) / 1e6
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(seen, [r["loss"] for r in records], color="#9ecae1", linewidth=0.8, label="training")
    held = [(t, r["valid_loss"]) for t, r in zip(seen, records, strict=True) if r.get("valid_loss") is not None]
    axes.plot(*zip(*held, strict=True), color="#08519c", marker="o", markersize=3, label="held out")
    axes.axhline(unigram, color="#d95f02", linestyle="--", label=f"unigram model, held out: {unigram:.2f}")
    minutes = sum(r["seconds"] for r in records) / 60
    where = summary["environment"]["device_name"]
    axes.set(
        title=f"{summary['model']}, {len(records)} steps in {minutes:.1f} min on {where}",
        xlabel="tokens seen (millions)",
        ylabel="cross-entropy (nats per token)",
    )
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(out, dpi=150)
    click.echo(json.dumps({"unigram": unigram, "model": summary["valid_loss"], "minutes": minutes, "device": where}))


if __name__ == "__main__":
    main()
