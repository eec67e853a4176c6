"""What all peers share: Luffy's options, data, schedule, files and meter around somebody else's model and exchange.

A `Peer` says how to build a model and what one forward pass, one synchronisation and one clipping are in its world.
`PeerRun` drives it just as `luffy.train.trainer.Trainer` drives ours: rank r reads the very sequences that Luffy would
give it at that step, the loss is the sum over its labels divided by the labels of all ranks, the learning rate follows
the same curve, AdamW has the same betas and decays matrices only, and a step's seconds begin and end at the same
places.
"""

from __future__ import annotations

import math
import statistics
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from importlib import metadata
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from benchmarks.peers.audit import Audit
from benchmarks.peers.counting import ByteCounter
from luffy.comm import Comm, Mesh
from luffy.config import ModelConfig
from luffy.errors import UserError
from luffy.lab.place import current_lab
from luffy.model import Runtime, build_model
from luffy.model.transformer import MicroBatch, Transformer
from luffy.recipes import get_recipe
from luffy.report.runs import read_metrics, warmup_steps
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.export import load_safetensors
from luffy.train.metrics import MetricsWriter, RunSummary, describe_machine, write_json_atomic
from luffy.train.options import TrainOptions, option_name
from luffy.train.reading import read_data
from luffy.train.trainer import Trainer

# Options of `luffy train` that say how Luffy works inside, or that no peer has; with any other value than their
# default they are refused. (`--recipe` is replaced by `--peer`.)
_NOT_FOR_PEERS = (
    "resume", "ep_size", "topology", "accumulate", "recompute", "export", "rehome_every", "wire",
    "residency", "fetch_limit", "condense", "condense_warmup", "condense_until", "trace_every", "layout",
    "shared_experts", "moe_every", "memory_length", "router_score", "normalize_topk", "locality_loss",
    "bias_update_rate", "overlap",
)  # fmt: skip

COUNTED = (
    "bytes that leave a rank, summed over ranks: all-to-all rows for other ranks; all-gather (n-1) x the part; "
    "reduce-scatter (n-1)/n, all-reduce 2(n-1)/n of the tensor; dispatch and combine are token rows, gradients is all "
    "synchronisation of weights and gradients, control the rest"
)


@dataclass(frozen=True)
class ControlComm(Comm):
    """Luffy's own small collectives, which are control traffic here as they are there."""

    counter: ByteCounter = field(kw_only=True)

    def all_reduce(self, tensor: Tensor, direction: str = "control") -> Tensor:
        with self.counter.charging(direction):
            return super().all_reduce(tensor, direction)

    def all_reduce_ep(self, tensor: Tensor, direction: str = "control") -> Tensor:
        with self.counter.charging(direction):
            return super().all_reduce_ep(tensor, direction)


def luffys_transformer(options: TrainOptions, config: ModelConfig, comm: Comm, dtype: torch.dtype) -> Transformer:
    """Luffy's model with the weights that Luffy begins with, into which a peer puts its own layers."""
    model = build_model(config, Runtime.create(comm, get_recipe("vanilla"), config), dtype=dtype, seed=options.seed)
    if options.start_weights is not None:
        load_safetensors(model, Path(options.start_weights))
    return model


class Peer(ABC):
    """Another system: its model and optimizer on this rank, and how to step them. Made after the world is joined."""

    name: ClassVar[str]
    summary: ClassVar[str]
    package: ClassVar[str]
    versions: ClassVar[tuple[str, str]]  # from the first, below the second
    install: ClassVar[str]

    model: nn.Module
    optimizer: torch.optim.Optimizer

    def __init__(
        self, options: TrainOptions, config: ModelConfig, comm: Comm, dtype: torch.dtype, counter: ByteCounter
    ) -> None:
        self.options, self.config, self.comm, self.dtype = options, config, comm, dtype
        self.counter, self.mesh = counter, comm.mesh

    @classmethod
    @abstractmethod
    def check(cls, options: TrainOptions) -> None:
        """Raise UserError for what this peer cannot do, naming option and mend."""

    @abstractmethod
    def differs(self) -> dict[str, str]:
        """What is not as in Luffy's model of the same name, for `summary.json`."""

    @abstractmethod
    def loss(self, micro: MicroBatch) -> tuple[Tensor, Tensor]:
        """(what to call backward on, this rank's share of the cross-entropy), the latter without gradient."""

    @abstractmethod
    def clip(self, max_norm: float) -> Tensor:
        """Finish the step's gradients and scale them to a global norm of `max_norm` (0: never); the norm before."""

    def evaluation_loss(self, micro: MicroBatch) -> Tensor:
        """This rank's share of the cross-entropy, [], where no gradient is wanted."""
        return self.loss(micro)[1]

    def end_evaluation(self) -> None:  # noqa: B027  (most have nothing to do)
        """Leave nothing behind that would spare the next step some of its traffic."""


def check_package(peer: type[Peer]) -> None:
    """Raise UserError with the command to install what a peer needs, without importing it."""
    low, high = peer.versions
    mend = f"install it with: {peer.install}"
    try:
        version = metadata.version(peer.package)
    except metadata.PackageNotFoundError:
        raise UserError(f"--peer {peer.name} needs {peer.package} {low}, which is not installed; {mend}") from None
    if not _numbers(low) <= _numbers(version) < _numbers(high):
        raise UserError(f"--peer {peer.name} needs {peer.package} {low} (below {high}), not {version}; {mend}")


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in version.split("+")[0].split(".")[:3] if part.isdigit())


def check_options(peer: type[Peer], options: TrainOptions) -> None:
    """Raise UserError for options of `luffy train` that have no meaning for a peer."""
    defaults = {f.name: (option_name(f), f.default) for f in fields(TrainOptions)}
    for name in _NOT_FOR_PEERS:
        option, default = defaults[name]
        if getattr(options, name) != default:
            raise UserError(f"{option} is Luffy's own; leave it out for --peer {peer.name}")
    if not options.model_config().causal:
        raise UserError(f"--model {options.model} is no decoder; --peer {peer.name} trains moe-gpt2 or moe-gpt2-tiny")
    if options.sequence_mode == "streams":
        raise UserError("--sequence-mode streams carries states from step to step; use documents or fixed for peers")
    peer.check(options)


class PeerRun:
    """One rank's part in a run of a peer."""

    # The same schedule and the same measure of memory, by the same code.
    learning_rate = Trainer.learning_rate
    _peak_memory = Trainer._peak_memory

    def __init__(
        self, peer: type[Peer], options: TrainOptions, mesh: Mesh, counter: ByteCounter, audit: bool = False
    ) -> None:
        self.options, self.mesh, self.counter = options, mesh, counter
        self.out = Path(options.out)
        self.comm = ControlComm(mesh, Comm.create(mesh).meter, counter=counter)
        options.check_world(mesh.world_size)
        reading = read_data(options)
        config, self.loader, self.valid_loader = reading.config, reading.loader, reading.valid_loader
        name = options.dtype if options.dtype != "auto" else "bfloat16" if mesh.device.type == "cuda" else "float32"
        self.dtype_name = name
        self.peer = peer(options, config, self.comm, getattr(torch, name), counter)
        self.audit = Audit(counter) if audit else None
        counter.take()  # agreeing on weights and groups is not part of a step's traffic
        self.step = 0
        self.valid_loss: float | None = None

    def _micro_batch(self, sequences: list[Any]) -> MicroBatch:
        return make_micro_batch(sequences, 0, gather_step([sequences], self.comm), self.comm)

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on all ranks; the record for `metrics.jsonl`, the same on every rank."""
        begin = time.perf_counter()
        peer = self.peer
        micro = self._micro_batch(self.loader.batch(self.step, self.mesh.rank, self.mesh.world_size))
        self.counter.begin(backward=False)
        loss, token_loss = peer.loss(micro)
        self.counter.begin(backward=True)
        loss.backward()
        norm = peer.clip(self.options.clip_norm)
        lr = self.learning_rate(self.step + 1)
        record = self._share(token_loss, norm)
        for group in peer.optimizer.param_groups:
            group["lr"] = lr
        peer.optimizer.step()
        peer.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        record |= {"step": self.step, "lr": lr, "tokens": micro.step_tokens}
        return record | {"seconds": time.perf_counter() - begin}

    def _share(self, token_loss: Tensor, norm: Tensor) -> dict[str, Any]:
        """Sum what ranks counted, as Luffy's trainer does: the sum's own bytes belong to the next step."""
        counts = self.counter.take()
        mine = torch.tensor(list(counts.values()), dtype=torch.float64, device=self.mesh.device)
        packed = torch.cat([token_loss.detach().to(torch.float64)[None], mine])
        values = self.comm.all_reduce(packed).tolist()
        grad_norm = float(norm)
        if not math.isfinite(values[0]) or not math.isfinite(grad_norm):
            raise RuntimeError(f"step {self.step + 1}: loss {values[0]}, gradient norm {grad_norm}: not finite")
        num_bytes = {kind: round(value) for kind, value in zip(counts, values[1:], strict=True)}
        return {"loss": values[0], "grad_norm": grad_norm, "bytes": num_bytes}

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean held-out loss over `eval_batches` batches, each weighted by its labels."""
        total, labels = 0.0, 0
        o, mesh = self.options, self.mesh
        for sequences in self.valid_loader.eval_batches(o.num_eval_micro_batches, mesh.rank, mesh.world_size):
            micro = self._micro_batch(sequences)
            self.counter.begin(backward=False)
            loss = self.comm.all_reduce(self.peer.evaluation_loss(micro).to(torch.float64).clone())
            total += float(loss) * micro.step_labels
            labels += micro.step_labels
        self.peer.end_evaluation()
        self.counter.take()  # evaluation is not part of a step's traffic
        return total / max(labels, 1)

    def run(self) -> RunSummary | None:
        """Train to the last step; the summary on rank 0, None elsewhere."""
        o, writer = self.options, None
        if self.mesh.rank == 0:
            writer = MetricsWriter(self.out, tensorboard=False)
            about = {"options": o.to_dict(), "model": self.peer.config.to_dict(), "peer": self.peer.name}
            write_json_atomic(self.out / "config.json", about)
        try:
            while self.step < o.steps:
                if self.audit is None:
                    record = self.train_step()
                else:
                    with self.audit:
                        record = self.train_step()
                if self.step == o.steps or (o.eval_every and self.step % o.eval_every == 0):
                    self.valid_loss = record["valid_loss"] = self.evaluate()
                if writer is not None:
                    writer.write(record)
        finally:
            if writer is not None:
                writer.close()
        return self._summarise()

    def _summarise(self) -> RunSummary | None:
        peak = torch.zeros(self.mesh.world_size, dtype=torch.int64, device=self.mesh.device)
        peak[self.mesh.rank] = self._peak_memory()
        highest = int(self.comm.all_reduce(peak).max())
        if self.mesh.rank != 0:
            return None
        records, lab, peer = read_metrics(self.out / "metrics.jsonl"), current_lab(), self.peer
        timed = [r["seconds"] for r in records[warmup_steps(len(records)) :]]
        summary = RunSummary.from_records(
            records,
            recipe=peer.name,
            model=self.options.model,
            world_size=self.mesh.world_size,
            peak_memory_bytes=highest,
            extra={
                "peer": {"package": peer.package, "version": metadata.version(peer.package), "what": peer.summary},
                "differs": peer.differs(),
                "bytes_counted": COUNTED,
                "step_seconds_median": statistics.median(timed),
                "seed": self.options.seed,
                "ep_size": self.mesh.ep_size,
                "dtype": self.dtype_name,
                "environment": describe_machine(self.mesh.device.type),
                **({} if lab is None else {"lab": lab.describe(), "provenance": "emulated", "network": lab.network}),
            },
        )
        summary.write(self.out)
        return summary
