"""How near routers learn to stay, and what it costs: many trainings of one model, rows that leave against loss.

    python benchmarks/local_routers.py sweep --work runs/local --data DATA --gpus 2 --jobs 8 --seconds 900
    python benchmarks/local_routers.py collect --work runs/local
    python benchmarks/local_routers.py figures

Every number comes from one process on one device: a model of C topics is a model for C ranks, and what its tokens
would send is counted from their choices. `sweep` skips what is finished, so a sweep that was cut short goes on.
"""

from __future__ import annotations

import gzip
import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from local_routers_figures import against_none, in_depth, named, pareto, summarised
from tokenizers import Tokenizer
from trainings import failure, fingerprint, side_by_side

from luffy.comm.mesh import Mesh
from luffy.data.loader import Sequence, SequenceLoader
from luffy.plan.trace import RoutingTrace
from luffy.seats.topic import TopicSeats
from luffy.seats.topics import Topics
from luffy.train.batching import StepTable, count_labels, make_micro_batch
from luffy.train.launch import join_world
from luffy.train.options import TrainOptions
from luffy.train.rehoming import current_owners, wire_of
from luffy.train.trainer import Trainer

SIZES: dict[str, dict[str, Any]] = {
    "64x8": {"experts": 64, "top_k": 8, "expert_hidden_size": 256},
    "16x2": {"experts": 16, "top_k": 2, "expert_hidden_size": 1024},
}
MODEL = {
    "model": "moe-llm",
    "layers": 6,
    "hidden_size": 512,
    "heads": 8,
    "max_sequence_length": 512,
    "vocab_size": 8192,
}
RESULTS = Path(__file__).parents[1] / "docs/results/local_routers.json"
DOMAIN_SEQUENCES = 256  # of each domain, at most
MEASURED = 16  # unseen batches whose choices are counted


def variants() -> list[dict[str, Any]]:
    """What is trained, the most telling first. start: the variant whose weights a fine-tuning begins from."""

    def variant(name: str, size: str, seed: int = 0, **more: Any) -> dict[str, Any]:
        keys = ("trace", "mixed")
        options = {"seed": seed, "steps": 2000} | {k: v for k, v in more.items() if k not in keys}
        return {"name": f"{size}-{name}-s{seed}", "size": size, "options": options} | {
            k: more[k] for k in keys if k in more
        }

    def pull(form: str, weight: float) -> dict[str, Any]:
        return {"seat_loss": weight, "seat_loss_form": form}

    groups = {"num_groups": 8, "top_k_groups": 2}
    out = []
    for seed in (0, 1, 2):
        for size, rows in (("64x8", 0.05), ("16x2", 0.1)):
            out += [variant("none", size, seed, **({"trace": 18} if seed == 0 else {}))]
            out += [variant("mass-0.1", size, seed, **pull("mass", 0.1))]
            out += [variant(f"rows-{rows}", size, seed, **pull("rows", rows))]
    out += [variant(f"rows-{w}", "64x8", **pull("rows", w)) for w in (0.01, 0.02, 0.03)]
    out += [variant(f"mass-{w}", "64x8", **pull("mass", w)) for w in (0.2, 0.3)]
    out += [variant("g2-rows-0.02", "64x8", **pull("rows", 0.02), **groups)]
    out += [variant("g2-mass-0.1", "64x8", **pull("mass", 0.1), **groups), variant("g2", "64x8", **groups)]
    out += [variant(f"rows-{w}", "16x2", **pull("rows", w)) for w in (0.05, 0.2)]
    out += [variant("mixed-none", "64x8", mixed=True)]
    out += [variant("mixed-rows-0.05", "64x8", mixed=True, **pull("rows", 0.05))]
    for size in SIZES:  # routings for placements fitted afterwards
        out += [variant(f"local-{w}", size, steps=500, trace=18, locality_loss=w) for w in (0.02, 0.05)]
    return out


class Mixed:
    """A loader whose sequences are four pieces of a quarter of the length each, of any documents."""

    def __init__(self, quarters: SequenceLoader) -> None:
        self.quarters, self.global_batch_size = quarters, quarters.global_batch_size // 4
        self.num_full_batches = quarters.num_full_batches

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Sequence]:
        return [_joined(p) for p in _fours(self.quarters.batch(step, rank, world_size))]

    def eval_batches(self, num: int | None = None, rank: int = 0, world_size: int = 1) -> Any:
        for batch in self.quarters.eval_batches(num, rank, world_size):
            yield [_joined(p) for p in _fours(batch)]


def _fours(pieces: list[Sequence]) -> list[list[Sequence]]:
    return [pieces[i : i + 4] for i in range(0, len(pieces), 4)]


def _joined(pieces: list[Sequence]) -> Sequence:
    tokens, labels = (np.concatenate([getattr(p, name) for p in pieces]) for name in ("tokens", "labels"))
    return Sequence(pieces[0].sequence_id // 4, tokens, labels, True)


class MixedTrainer(Trainer):
    """A trainer of mixed sequences: topics are worth what a quarter of a document says."""

    def _load_data(self) -> None:
        options, length = self.options, self.options.sequence_length or 512
        short = replace(options, batch_size=options.batch_size * 4, sequence_length=length // 4)
        self.options = short
        super()._load_data()
        self.options = options
        self.loader, self.valid_loader = Mixed(self.loader), Mixed(self.valid_loader)  # type: ignore[assignment]


def options_of(variant: dict[str, Any], work: Path, data: str, device: str, cache: str | None) -> TrainOptions:
    """The training that a variant names."""
    settings = MODEL | SIZES[variant["size"]] | {
        "recipe": "vanilla_dedup", "data": data, "cache_dir": cache, "device": device, "steps": 2000, "seats": "topic",
        "topics": 8, "batch_size": 32, "sequence_length": 256, "eval_batches": 64, "keep_checkpoints": 0,
        "tensorboard": False, "overwrite": True, "out": str(work / "runs" / variant["name"]),
        "profile_attention": False,
    }  # fmt: skip
    settings |= variant.get("options", {})
    settings["eval_every"] = max(1, settings["steps"] // 4)
    if "start" in variant:
        settings["start_weights"] = str(work / "runs" / variant["start"] / "model.safetensors")
    return TrainOptions(**settings)


def output_of(
    trainer: Trainer, sequences: list[Sequence], topics: np.ndarray | None = None, num_topics: int = 0
) -> Any:
    """What the model makes of sequences, [S] topics; on one rank."""
    lengths = np.array([len(s.tokens) for s in sequences], dtype=np.int64)
    step = StepTable([[lengths]], count_labels(sequences), None if topics is None else [[topics]], num_topics)
    return trainer.model(make_micro_batch(sequences, 0, step, trainer.comm))


def topics_of(trainer: Trainer) -> Topics:
    seats = trainer.reader.seats
    assert isinstance(seats, TopicSeats) and seats.topics is not None
    return seats.topics


@torch.no_grad()
def count_choices(trainer: Trainer, num_topics: int, batches: int = MEASURED) -> np.ndarray:
    """[layers, C, C]: share of the tokens of unseen batches by topic and by block of experts chosen."""
    topics, total = topics_of(trainer).regrouped(num_topics), None
    for step in range(batches):
        sequences = trainer.loader.batch(trainer.options.steps + step)
        totals = output_of(trainer, sequences, topics.assign([s.tokens for s in sequences]), num_topics).aux.totals
        traffic = totals.seat_traffic.double() / totals.num_tokens
        total = traffic if total is None else total + traffic
    assert total is not None
    return (total / batches).cpu().numpy()


@torch.no_grad()
def loss_by_domain(trainer: Trainer, valid: Path, corpus_valid: Any, length: int) -> dict[str, float]:
    """Held-out loss of each domain's documents; the file's order is that of the held-out split."""
    with gzip.open(valid, "rt") as file:
        domains = [json.loads(line)["domain"] for line in file]
    if len(domains) != corpus_valid.num_documents:
        return {}
    sums: dict[str, list[float]] = {}
    pieces: dict[str, list[Sequence]] = {}
    for i, domain in enumerate(domains):
        tokens = np.asarray(corpus_valid.document(i)).astype(np.int64)
        for begin in range(0, len(tokens) - 16, length):
            piece = tokens[begin : begin + length + 1]
            pieces.setdefault(domain, []).append(Sequence(0, piece[:-1], piece[1:].copy(), True))
    for domain, sequences in pieces.items():
        for begin in range(0, min(len(sequences), DOMAIN_SEQUENCES), 64):
            batch = sequences[begin : begin + 64]
            entry, labels = sums.setdefault(domain, [0.0, 0]), count_labels(batch)
            entry[0] += float(output_of(trainer, batch).token_loss) * labels
            entry[1] += labels
    return {domain: total / labels for domain, (total, labels) in sums.items()}


@torch.no_grad()
def record_trace(trainer: Trainer, path: Path, batches: int) -> None:
    """Choices of unseen batches, for placements and seats fitted afterwards."""
    recorded, recorder = [], trainer.runtime.recorder
    for step in range(batches):
        first = trainer.options.steps + 2 * step
        sequences = trainer.loader.batch(first) + trainer.loader.batch(first + 1)
        recorder.active = True
        output_of(trainer, sequences)
        tokens = torch.from_numpy(np.concatenate([s.tokens for s in sequences]))
        step_trace = recorder.finish(trainer.comm, trainer.step, tokens)
        recorded.append(
            replace(step_trace, foreseen=np.full_like(step_trace.foreseen, -1))
        )  # nobody asks, much to keep
    router, wire = trainer.config.router, wire_of(trainer.model, False)
    about = {"model": "local_routers " + path.stem, "ep_size": 1, "expert_num_bytes": wire.expert_num_bytes}
    RoutingTrace(
        tuple(recorded), num_experts=router.num_experts, top_k=router.top_k, hidden_size=trainer.config.hidden_size,
        row_num_bytes=wire.row_num_bytes, owners=current_owners(trainer.model), about=about,
    ).save(path)  # fmt: skip


def train_one(variant: dict[str, Any], options: TrainOptions, mesh: Mesh, work: Path) -> None:
    """Train a variant, measure it, write WORK/results/NAME.json, and record choices where asked."""
    begin = time.perf_counter()
    trainer = (MixedTrainer if variant.get("mixed") else Trainer)(options, mesh)
    summary = trainer.run()
    assert summary is not None
    result = variant | {"loss": summary.valid_loss, "steps": options.steps, "minutes": 0.0}
    records = [json.loads(line) for line in (Path(options.out) / "metrics.jsonl").read_text().splitlines()]
    result["balance"] = float(np.mean([r["balance"] for r in records[-50:]]))
    result["curve"] = [[r["step"], r["valid_loss"]] for r in records if "valid_loss" in r]
    result["rows_over_steps"] = [
        [r["step"], *([layer[kind] for layer in r["topics_by_layer"]] for kind in ("rows_away", "blocks_touched"))]
        for r in records if "topics_by_layer" in r and (r["step"] % 100 == 0 or r["step"] <= 50)
    ]  # fmt: skip
    C = topics_of(trainer).num_topics
    result["traffic"] = {str(n): count_choices(trainer, n).round(5).tolist() for n in sorted({C, 4}) if C % n == 0}
    data = Path(options.data)
    valid = next(iter(data.glob("*valid*.gz")), None) if data.is_dir() else None
    if valid is not None and not variant.get("mixed"):
        result["domains"] = loss_by_domain(trainer, valid, trainer.valid_loader._pieces._split, 256)
    if C <= 16:
        result["telling"] = topics_of(trainer).telling_ids(12).tolist()
    result["seconds_a_step"] = float(np.median([r["seconds"] for r in records[5:]] or [0]))
    result["minutes"] = (time.perf_counter() - begin) / 60
    (work / "results").mkdir(parents=True, exist_ok=True)
    path = work / "results" / f"{variant['name']}.json"
    path.with_suffix(".part").write_text(json.dumps(result))
    path.with_suffix(".part").rename(path)
    if variant.get("trace"):
        (work / "traces").mkdir(parents=True, exist_ok=True)
        record_trace(trainer, work / "traces" / f"{variant['name']}.npz", variant["trace"])


@click.group()
def main() -> None:
    """Local routers: sweep, collect, figures."""


@main.command()
@click.option("--work", type=Path, required=True)
@click.option("--data", required=True)
@click.option("--device", default="cuda")
@click.option("--cache", default=None)
@click.argument("variant")
def one(work: Path, data: str, device: str, cache: str | None, variant: str) -> None:
    """Train one variant, given as JSON."""
    described = json.loads(variant)
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1"}
    os.environ["MASTER_PORT"] = str(20000 + os.getpid() % 20000)
    options = options_of(described, work, data, device, cache)
    mesh = join_world(options.device, "gloo", None, None, 600.0)
    train_one(described, options, mesh, work)


@main.command()
@click.option("--work", type=Path, required=True)
@click.option("--data", required=True)
@click.option("--device", default="cuda")
@click.option("--cache", default=None, help="As luffy train's --cache-dir.")
@click.option("--gpus", default=1, help="0: as they are seen.")
@click.option("--jobs", default=1, help="Trainings at a time. Under CUDA's MPS several share a GPU well.")
@click.option("--seconds", default=3600.0, help="No training begins after so long.")
@click.option("--only", default="", help="Only variants whose name contains this.")
def sweep(
    work: Path, data: str, device: str, cache: str | None, gpus: int, jobs: int, seconds: float, only: str
) -> None:
    """Train all variants that are not finished, several side by side."""
    work.mkdir(parents=True, exist_ok=True)

    def task(variant: dict[str, Any]) -> tuple[str, Any]:
        def do(environment: dict[str, str]) -> str:
            done = work / "results" / f"{variant['name']}.json"
            if done.exists():
                return "was finished"
            command = [sys.executable, __file__, "one", "--work", str(work), "--data", data, "--device", device]
            command += [] if cache is None else ["--cache", cache]
            why = failure([*command, json.dumps(variant)], environment)
            if why is not None:
                return f"FAILED: {why}"
            found = summarised(json.loads(done.read_text()))
            return f"loss {found['loss']:.4f}, rows away {found['away']:.3f}, {found['minutes']:.1f} min"

        return variant["name"], do

    wanted = [task(v) for v in variants() if only in v["name"]]
    side_by_side(wanted, jobs=jobs, gpus=gpus, seconds=seconds)
    click.echo(fingerprint(data))


@main.command()
@click.option("--work", type=Path, required=True)
@click.option("--json", "target", type=Path, default=RESULTS, show_default=True)
@click.option("--tokenizer", type=Path, default=None, help="To write the most telling tokens of each topic.")
@click.option("--note", default="", help="Machine and data, in words.")
def collect(work: Path, target: Path, tokenizer: Path | None, note: str) -> None:
    """All results of a sweep in one file."""
    results = [json.loads(path.read_text()) for path in sorted((work / "results").glob("*.json"))]
    telling: list[list[str]] = []
    if tokenizer is not None and results:
        decode = Tokenizer.from_file(str(tokenizer)).decode
        telling = [[decode([i]) for i in ids] for ids in results[0]["telling"]]
    target.parent.mkdir(parents=True, exist_ok=True)
    whole = {"note": note, "telling": telling, "runs": [summarised(r) for r in results]}
    target.write_text(json.dumps(whole, ensure_ascii=False) + "\n")


@main.command()
@click.option("--json", "source", type=Path, default=RESULTS, show_default=True)
@click.option("--out", type=Path, default=RESULTS.parents[1] / "figures", show_default=True)
def figures(source: Path, out: Path) -> None:
    """A table, and the pictures of the page."""
    runs = json.loads(source.read_text())["runs"]
    click.echo("| variant | seed | held-out loss | over none's, same seed | rows away | of vanilla_dedup's | busiest |")
    click.echo("|---|---|---|---|---|---|---|")
    for r in runs:
        gap, share, busiest = against_none(r, runs)
        if r["steps"] < 2000:  # short ones, for their choices
            continue
        kind = ("mixed " if r.get("mixed") else "") + r["size"]
        click.echo(
            f"| {kind} {named(r)} | {r['options']['seed']} | {r['loss']:.4f} | {gap:+.4f} | {r['away']:.3f} | "
            f"{share:.3f} | {busiest:.3f} |"
        )
    out.mkdir(parents=True, exist_ok=True)
    pareto(runs).savefig(out / "local_routers.png", dpi=140)
    in_depth(runs).savefig(out / "local_routers_depth.png", dpi=140)


if __name__ == "__main__":
    main()
