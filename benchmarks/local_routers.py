"""How near routers learn to stay, and what it costs: many trainings of one model, rows that leave the seat against loss.

    python benchmarks/local_routers.py sweep --work runs/local --data DATA --gpus 2 --jobs 8 --seconds 900
    python benchmarks/local_routers.py collect --work runs/local --json docs/results/local_routers.json
    python benchmarks/local_routers.py figures --json docs/results/local_routers.json --out docs/figures

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
from trainings import failure, fingerprint, side_by_side

from luffy.comm.mesh import Mesh
from luffy.data.loader import Sequence, SequenceLoader
from luffy.plan.trace import RoutingTrace
from luffy.train.batching import gather_step, make_micro_batch
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
DOMAIN_SEQUENCES = 256  # of each domain, at most
MEASURED = 16  # unseen batches whose choices are counted


class Mixed:
    """A loader whose sequences are four pieces of a quarter of the length each, of any documents."""

    def __init__(self, quarters: SequenceLoader) -> None:
        self.quarters, self.global_batch_size = quarters, quarters.global_batch_size // 4
        self.num_full_batches = quarters.num_full_batches

    def batch(self, step: int, rank: int = 0, world_size: int = 1) -> list[Sequence]:
        return [_joined(p) for p in _fours(self.quarters.batch(step, rank, world_size))]

    def eval_batches(self, num: int, rank: int = 0, world_size: int = 1) -> Any:
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


@torch.no_grad()
def count_choices(trainer: Trainer, num_topics: int, batches: int = MEASURED) -> np.ndarray:
    """[layers, C, C]: share of the tokens of unseen batches by topic and by block of experts chosen."""
    assert trainer.topics is not None and trainer.topics.topics is not None
    topics, total = trainer.topics.topics.regrouped(num_topics), None
    for step in range(batches):
        sequences = trainer.loader.batch(trainer.options.steps + step)
        own = topics.assign([s.tokens for s in sequences])[None]
        micro = make_micro_batch(
            sequences, 0, gather_step([sequences], trainer.comm), trainer.comm, topics=own, num_topics=num_topics
        )
        traffic = trainer.model(micro).aux.seat_traffic.double()
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
            micro = make_micro_batch(batch, 0, gather_step([batch], trainer.comm), trainer.comm)
            entry = sums.setdefault(domain, [0.0, 0])
            entry[0] += float(trainer.model(micro).token_loss) * micro.step_labels
            entry[1] += micro.step_labels
    return {domain: total / labels for domain, (total, labels) in sums.items()}


@torch.no_grad()
def record_trace(trainer: Trainer, path: Path, batches: int) -> None:
    """Choices of unseen batches, for placements and seats fitted afterwards."""
    recorded, recorder = [], trainer.runtime.recorder
    for step in range(batches):
        first = trainer.options.steps + 2 * step
        sequences = trainer.loader.batch(first) + trainer.loader.batch(first + 1)
        micro = make_micro_batch(sequences, 0, gather_step([sequences], trainer.comm), trainer.comm)
        recorder.active = True
        trainer.model(micro)
        step_trace = recorder.finish(trainer.comm, trainer.step, micro.tokens)
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
    assert summary is not None and trainer.topics is not None
    result = variant | {"loss": summary.valid_loss, "steps": options.steps, "minutes": 0.0}
    records = [json.loads(line) for line in (Path(options.out) / "metrics.jsonl").read_text().splitlines()]
    result["balance"] = float(np.mean([r["balance"] for r in records[-50:]]))
    result["curve"] = [[r["step"], r["valid_loss"]] for r in records if "valid_loss" in r]
    result["rows_over_steps"] = [
        [r["step"], [layer["rows_away"] for layer in r["topics_by_layer"]], [layer["blocks_touched"] for layer in r["topics_by_layer"]]]
        for r in records if "topics_by_layer" in r and (r["step"] % 100 == 0 or r["step"] <= 50)
    ]  # fmt: skip
    C = trainer.topics.num_topics
    result["traffic"] = {str(n): count_choices(trainer, n).round(5).tolist() for n in sorted({C, 4}) if C % n == 0}
    data = Path(options.data)
    valid = next(iter(data.glob("*valid*.gz")), None) if data.is_dir() else None
    if valid is not None and not variant.get("mixed"):
        result["domains"] = loss_by_domain(trainer, valid, trainer.valid_loader._pieces._split, 256)
    if C <= 16:
        result["telling"] = trainer.topics.topics.telling_ids(12).tolist()  # type: ignore[union-attr]
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
@click.option("--cache", default=None)
@click.option("--gpus", default=1)
@click.option("--jobs", default=1)
@click.option("--seconds", default=3600.0)
@click.option("--variants", type=Path, required=True, help="JSON: a list of {name, size, options, ...}")
def sweep(
    work: Path, data: str, device: str, cache: str | None, gpus: int, jobs: int, seconds: float, variants: Path
) -> None:
    """Train all variants of a file that are not finished, several side by side."""
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
            result = json.loads(done.read_text())
            traffic = np.array(next(iter(result["traffic"].values())))
            return f"loss {result['loss']:.4f}, away {(traffic.sum((1, 2)) - np.trace(traffic, axis1=1, axis2=2)).mean():.3f}, {1000 * result['seconds_a_step']:.0f} ms, {result['minutes']:.1f} min"

        return variant["name"], do

    side_by_side([task(v) for v in json.loads(variants.read_text())], jobs=jobs, gpus=gpus, seconds=seconds)
    click.echo(fingerprint(data))


if __name__ == "__main__":
    main()
