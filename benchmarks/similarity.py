"""How alike are the tokens of one expert? What condensation has to work with, in the model's first steps and trained.

    luffy train ... --export --out RUN        (once with few steps, once with many)
    python benchmarks/similarity.py --run EARLY --run TRAINED --out docs/results/similarity.json \
        --figure docs/figures/similarity.png

For held-out text, by block: cosines of pairs of tokens that share an expert, as the expert sees them, with the mean of
all its tokens removed, and of what the expert makes of them (the questions of Figure 5 of arXiv 2411.15419); how a
pair's similarity in one block foretells the next (Figure 7); copies that are kept at each threshold, greedily and in
causal order, by block; and the share of pairs that the history filter (0.8, 0.2) spares from being measured.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import click
import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from matplotlib.figure import Figure
from safetensors.torch import load_file

from luffy.comm import Comm, build_mesh
from luffy.data import SequenceLoader, prepare_corpus
from luffy.kernels.representatives import choose_representatives
from luffy.model import Runtime, build_model
from luffy.plan.condensation import ALIKE, UNLIKE
from luffy.recipes import get_recipe
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.options import TrainOptions

THRESHOLDS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98)
EDGES = np.linspace(-0.5, 1.0, 31)


def seen_by_experts(run: Path, data: str, device: torch.device) -> list[dict]:
    """By MoE layer: x [T, D], the experts' inputs, and ids [T, K], for one batch of held-out text; and the layer."""
    o = TrainOptions(**json.loads((run / "config.json").read_text())["options"])
    corpus = prepare_corpus(
        data, text_field=o.text_field, tokenizer=o.tokenizer, vocab_size=o.vocab_size or 8192, cache_dir=o.cache_dir,
        valid_fraction=o.valid_fraction,
    )  # fmt: skip
    config = o.model_config().override(vocab_size=corpus.vocab_size)
    comm = Comm.create(build_mesh(device))
    model = build_model(config, Runtime.create(comm, get_recipe("vanilla_dedup"), config), dtype=torch.float32)
    missing, unused = model.load_state_dict(load_file(run / "model.safetensors"), strict=False)
    assert not unused and all("slot_of_expert" in name or "choice_bias" in name for name in missing)
    seen: list[dict] = []

    def note(router, inputs, output):
        seen.append({"x": inputs[0].detach(), "ids": output[0].topk_expert_ids})

    for layer in model.moe_layers:
        layer.router.register_forward_hook(note)
    loader = SequenceLoader(
        corpus.valid, sequence_length=o.sequence_length or config.max_sequence_length, global_batch_size=8, seed=0,
        mode=o.sequence_mode, eos_id=corpus.eos_id, shuffle=False,
    )  # fmt: skip
    sequences = next(iter(loader.eval_batches(1, 0, 1)))
    with torch.no_grad():
        model(make_micro_batch(sequences, 0, gather_step([sequences], comm), comm))
    for s, layer in zip(seen, model.moe_layers, strict=True):
        s["layer"] = layer
    return seen


def off_diagonal(similarity: torch.Tensor) -> torch.Tensor:
    n = similarity.shape[0]
    return similarity[torch.triu_indices(n, n, 1, device=similarity.device).unbind(0)]


@torch.no_grad()
def measure(seen: list[dict]) -> dict:
    """Histograms and shares of one model; all lists are by block."""
    out: dict = {
        "raw": [],
        "centred": [],
        "after": [],
        "kept": [],
        "next": [],
        "spared": [],
        "tokens": len(seen[0]["x"]),
    }
    T, before = len(seen[0]["x"]), None
    for s in seen:
        x, layer = s["x"], s["layer"]
        E = layer.router.config.num_experts
        unit = F.normalize(x, dim=1)
        raw, centred, after = [], [], []
        kept = np.zeros(len(THRESHOLDS))
        copies = pairs = spared = 0
        now = torch.full((T, T), torch.nan, device=x.device)
        for e in range(E):
            index = (s["ids"] == e).any(1).nonzero().squeeze(1)
            if len(index) < 2:
                continue
            rows = x[index]
            cosine = unit[index] @ unit[index].T
            raw.append(off_diagonal(cosine))
            middle = F.normalize(rows - rows.mean(0), dim=1)
            centred.append(off_diagonal(middle @ middle.T))
            counts = torch.zeros(E, dtype=torch.int64, device=x.device)
            counts[e] = len(rows)
            answer = F.normalize(layer.experts(rows, counts), dim=1)
            after.append(off_diagonal(answer @ answer.T))
            copies += len(index)
            for i, h in enumerate(THRESHOLDS):
                place = choose_representatives(unit[index], torch.arange(len(index), device=x.device)[None], h,
                                               causal=True, nearest=True, kernel=False)[0]  # fmt: skip
                kept[i] += int((place == torch.arange(len(index), device=x.device)).sum())
            now[index[:, None], index[None, :]] = cosine
            if before is not None:
                known = off_diagonal(before[index][:, index])
                known = known[~known.isnan()]
                pairs += len(index) * (len(index) - 1) // 2
                spared += int(((known > ALIKE) | (known < UNLIKE)).sum())
        for name, values in (("raw", raw), ("centred", centred), ("after", after)):
            out[name].append(np.histogram(torch.cat(values).cpu().numpy(), EDGES)[0].tolist())
        out["kept"].append((kept / max(1, copies)).tolist())
        if before is not None:
            both = ~(before.isnan() | now.isnan())
            both &= torch.ones_like(both).triu(1)
            a, b = before[both].cpu().numpy(), now[both].cpu().numpy()
            out["next"].append(np.histogram2d(a, b, (EDGES, EDGES))[0].astype(int).tolist())
            out["spared"].append(spared / max(1, pairs))
        before = now
    return out


def draw(results: dict[str, dict]) -> Figure:
    """A row a model: similarity by block, persistence, kept by threshold."""
    figure = Figure(figsize=(13, 3.6 * len(results)), layout="constrained")
    grid = figure.subplots(len(results), 4, squeeze=False)
    centres = (EDGES[1:] + EDGES[:-1]) / 2
    for row, (name, r) in zip(grid, results.items(), strict=True):
        blocks = range(len(r["raw"]))
        for kind, colour in (("raw", "C0"), ("centred", "C1"), ("after", "C2")):
            values = [np.average(centres, weights=r[kind][b]) for b in blocks]
            high = [np.sum(np.array(r[kind][b])[centres > ALIKE]) / np.sum(r[kind][b]) for b in blocks]
            row[0].plot(blocks, values, color=colour, marker="o", markersize=3, label=f"{kind}, mean")
            row[1].plot(blocks, high, color=colour, marker="o", markersize=3, label=kind)
        row[0].set(title=f"{name}: cosine of pairs in one expert", xlabel="MoE block", ylim=(-0.1, 1))
        row[1].set(title=f"pairs above {ALIKE}", xlabel="MoE block", ylim=(0, 1))
        total = np.sum(r["next"], axis=0).astype(float)
        row[2].imshow((total / np.maximum(1, total.sum(1, keepdims=True))).T, origin="lower", aspect="auto",
                      extent=(EDGES[0], EDGES[-1], EDGES[0], EDGES[-1]), cmap="Blues", vmax=0.3)  # fmt: skip
        row[2].set(title="a pair's cosine one block on", xlabel="in a block", ylabel="in the next")
        for b in blocks:
            row[3].plot(THRESHOLDS, r["kept"][b], color=f"C{b % 10}", label=f"block {b}")
        row[3].set(title="copies kept, causal", xlabel="threshold", ylim=(0, 1))
        for axes in (row[0], row[1], row[3]):
            axes.legend(frameon=False, fontsize=7)
            axes.spines[["top", "right"]].set_visible(False)
    return figure


@click.command()
@click.option("--run", "runs", multiple=True, required=True, type=click.Path(path_type=Path, exists=True))
@click.option("--data", required=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--out", required=True, type=click.Path(path_type=Path))
@click.option("--figure", required=True, type=click.Path(path_type=Path))
def main(runs: tuple[Path, ...], data: str, device: str, out: Path, figure: Path) -> None:
    """Measure each run's exported model; write numbers and a picture."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "RANK": "0", "WORLD_SIZE": "1"}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    results = {}
    for run in runs:
        steps = json.loads((run / "summary.json").read_text())["steps"]
        results[f"step {steps}"] = measure(seen_by_experts(run, data, torch.device(device)))
        r = results[f"step {steps}"]
        kept = {h: round(float(np.mean([k[i] for k in r["kept"]])), 3) for i, h in enumerate(THRESHOLDS)}
        click.echo(f"step {steps}: kept by threshold {kept}, pairs spared by history {np.mean(r['spared']):.2f}")
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({"edges": EDGES.tolist(), "thresholds": THRESHOLDS, "models": results}) + "\n")
    figure.parent.mkdir(parents=True, exist_ok=True)
    draw(results).savefig(figure, dpi=130)


if __name__ == "__main__":
    main()
