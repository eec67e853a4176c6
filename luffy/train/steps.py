"""The steps of a training run: from options to a model, and from sequences to an update.

    step:  parts before -> sequences at their seats -> forward, backward (exchange inside) -> sum gradients -> clip
           -> AdamW -> measure -> parts after

What happens around a step are parts (luffy.train.parts); what happens around all of them is luffy.train.trainer.
"""

from __future__ import annotations

import math
import threading
import time
from pathlib import Path
from typing import Any

import torch

from luffy.comm import Comm, Mesh
from luffy.compose import Runtime
from luffy.data import mask_for_mlm
from luffy.data.loader import Sequence, SequenceLoader
from luffy.lab.place import current_lab
from luffy.model import ModelOutput, build_model
from luffy.model.aux_loss import RouterTotals
from luffy.model.casting import keep_over_micro_batches
from luffy.model.stack import MicroBatch
from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology, parse_topology
from luffy.report.units import parse_num_bytes
from luffy.seats.layout import SeatLayout
from luffy.train.attention import AttentionFit
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.beginning import check_data, check_options, data_facts
from luffy.train.gradients import GradientSync, make_optimizer
from luffy.train.measure import LOAD_EVERY, Measure
from luffy.train.memory import training_need, without_vocabulary
from luffy.train.operations import Operations
from luffy.train.options import TrainOptions
from luffy.train.parts import Done
from luffy.train.parts.choose import choose_parts
from luffy.train.progress import phase
from luffy.train.rates import half_of_memory
from luffy.train.reading import read_data
from luffy.train.seating import StepReader


class Steps:
    """One rank's part in the steps of a run. Make it on every rank of an initialised world."""

    loader: SequenceLoader
    valid_loader: SequenceLoader
    vocabulary: str

    def __init__(self, options: TrainOptions, mesh: Mesh) -> None:
        self.options, self.mesh = options, mesh
        self.out = Path(options.out)
        self.comm = Comm.create(mesh)
        check_options(options.to_dict(), mesh)
        options.check_world(mesh.world_size)
        self.micro_size = options.batch_size // options.num_micro_batches
        self.dtype_name = options.dtype
        if options.dtype == "auto":
            self.dtype_name = "bfloat16" if mesh.device.type == "cuda" else "float32"
        self._check_memory()
        self._load_data()
        self.data_facts = data_facts(self.loader, self.valid_loader, self.vocabulary)
        check_data(self.data_facts, str(options.data), mesh)
        self.changes: list[str] = []  # on a resume, of options
        self.model = self._build_model()
        self.config, self.runtime = self.model.config, self.model.runtime
        self.expert_flops: float | None = None
        if self.runtime.residency is not None:
            limit = options.fetch_limit
            self.runtime.residency.limit_num_bytes = (
                half_of_memory(mesh.device, mesh.node_of_rank.count(mesh.node_of_rank[mesh.rank]))
                if limit is None
                else parse_num_bytes(limit, "--fetch-limit")
            )
        self.clock = self.runtime.clock
        fused = mesh.device.type == "cuda"
        self.optimizer = make_optimizer(self.model, options.lr, options.weight_decay, fused)
        self.sync = GradientSync(self.model, self.comm, options.get_gradient_dtype(), self.clock)
        self.memory = self._empty_memory(self.micro_size // mesh.world_size)
        self.step = 0
        self.valid_loss: float | None = None
        self.attention_fit: AttentionFit | None = None
        keep_over_micro_batches()  # the optimizer is one of torch's
        self.ops = Operations(options, self.model, mesh)
        self.measure = Measure(self.runtime, self.ops)
        # Micro-batches that take turns; a step that is recorded takes them one by one.
        self.turns = 2 if options.overlap else 1
        self._reads = threading.Lock()
        self.reader = StepReader(self._read, self._seat_layout(), self.comm)
        self.parts = choose_parts(self)

    def _check_memory(self) -> None:
        """UserError for sizes that cannot fit, before minutes have passed."""
        o, mesh = self.options, self.mesh
        length = o.sequence_length or o.model_config().max_sequence_length
        rows = self.micro_size // mesh.world_size * (1 if o.sequence_mode == "documents" else length)
        config = without_vocabulary(o.model_config())
        dtype = getattr(torch, self.dtype_name)
        need = training_need(config, mesh.ep_size, dtype, rows)
        need.check(mesh.device, "--layers, --hidden-size, --expert-hidden-size, --experts or --batch-size")

    def _load_data(self) -> None:
        """Set `config`, `mask_id`, `loader` and `valid_loader`."""
        with phase("prepare data", enabled=self.mesh.rank == 0) as progress:
            reading = read_data(self.options, progress)
        self.config, self.mask_id = reading.config, reading.mask_id
        self.loader, self.valid_loader = reading.loader, reading.valid_loader
        self.vocabulary = reading.vocabulary

    def _build_model(self) -> Any:
        """The model with its runtime, initialised, on the mesh's device."""
        options, dtype = self.options, getattr(torch, self.dtype_name)
        runtime = Runtime.create(self.comm, options.get_recipe(), self.config, options.recompute, self._links())
        return build_model(self.config, runtime, dtype=dtype, seed=options.seed)

    def _links(self) -> Topology | None:
        """The links to plan for: those of --topology, else those of the lab that this run stands in, else unknown."""
        lab = current_lab()
        if self.options.topology is None and lab is not None and lab.topology and lab.ranks == self.mesh.ep_size:
            return parse_topology(lab.topology, "--link")
        return self.options.links()

    def _seat_layout(self) -> SeatLayout:
        o, mesh = self.options, self.mesh
        return SeatLayout(
            mesh.ep_size, mesh.dp_size, o.num_micro_batches, o.layout == "padded", self.runtime.topology,
            AttentionCost(self.config.hidden_size),
        )  # fmt: skip

    def _empty_memory(self, num_sequences: int) -> tuple[torch.Tensor, ...] | None:
        """Zeros for segment recurrence: one [S, M, D] per block."""
        cfg = self.config
        if not cfg.memory_length:
            return None
        shape = (num_sequences, cfg.memory_length, cfg.hidden_size)
        dtype, device = self.model.stream_dtype, self.mesh.device
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.num_layers))

    # ---------------------------------------------------------------- one step

    def _read(self, loader_step: int, rank: int, world_size: int) -> list[Sequence]:
        """By one thread at a time: loaders keep the order of the epoch that they last read of, and seats are decided
        ahead while the step may read sequences to record."""
        with self._reads:
            return [self._mask(s) for s in self.loader.batch(loader_step, rank, world_size)]

    def _mask(self, sequence: Sequence) -> Sequence:
        if self.mask_id is None:
            return sequence
        return mask_for_mlm(sequence, mask_id=self.mask_id, vocab_size=self.config.vocab_size, seed=self.options.seed)

    def _memory_for(self, sequences: list[Sequence]) -> tuple[torch.Tensor, ...] | None:
        """The lanes' states, cleared where a lane begins anew."""
        if self.memory is None:
            return None
        keep = [float(not s.starts_stream) for s in sequences]
        mask = torch.tensor(keep, device=self.mesh.device, dtype=self.memory[0].dtype)[:, None, None]
        return tuple(m * mask for m in self.memory)

    def read_micro_batch(self, step: int, index: int) -> MicroBatch:
        """The index-th micro-batch from step `step` on, as every rank reads its own; all call it."""
        loader_step = step * self.options.num_micro_batches + index
        sequences = self._read(loader_step, self.mesh.rank, self.mesh.world_size)
        return self._alone(sequences, self._memory_for(sequences))

    def _alone(self, sequences: list[Sequence], memory: tuple[torch.Tensor, ...] | None) -> MicroBatch:
        """A micro-batch that is a step by itself."""
        padded = self.options.layout == "padded"
        return make_micro_batch(
            sequences, 0, gather_step([sequences], self.comm), self.comm, padded=padded, memory=memory
        )

    def learning_rate(self, step: int) -> float:
        """Linear warm-up, then cosine down to `min_lr` x `lr` at the last step. `step` counts from 1."""
        o = self.options
        warmup = o.warmup_steps if o.warmup_steps is not None else min(200, max(1, o.steps // 20))
        if step <= warmup:
            return o.lr * step / warmup
        progress = (step - warmup) / max(1, o.steps - warmup)
        return o.lr * (o.min_lr + (1 - o.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress))))

    def train_step(self) -> dict[str, Any]:
        """One optimizer step on all ranks; the record for `metrics.jsonl`, the same on every rank."""
        begin, step = time.perf_counter(), self.step
        self.clock.start()
        self.ops.begin_step(step + 1)
        for part in self.parts:
            part.before(step)
        memory = self.memory
        self.runtime.draws.begin(step)
        done = Done({}, seated=self.reader.take(step))
        assert done.seated is not None
        token_loss = self._forward_backward(done)
        norm = self.sync.clip(self.options.clip_norm)
        lr = self.learning_rate(step + 1)
        in_full = (step + 1) % LOAD_EVERY == 0 or step + 1 == self.options.steps
        totals = self.measure.step(step + 1, token_loss, norm, done.routers, in_full, self._forward_again, done.seated)
        done.skipped = "skipped" in totals
        if done.skipped:
            self.memory = memory
        else:
            for group in self.optimizer.param_groups:
                group["lr"] = lr
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        done.record |= {"step": self.step, **totals, "lr": lr, "seconds": time.perf_counter() - begin}
        done.record |= {"tokens": done.seated.table.num_tokens}
        for part in self.parts:
            part.after(step, done)
        return done.record

    def _forward_backward(self, done: Done) -> torch.Tensor:
        """All micro-batches of a step; this rank's share of its loss, []. Notes in `done` what they say besides."""
        seated, recorder = done.seated, self.runtime.recorder
        assert seated is not None
        recording = any(part.records(self.step) for part in self.parts)
        done.plain = not recording
        A, turns = len(seated.micro_batches), 1 if recording else self.turns
        token_loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        for first in range(0, A, turns):
            group = seated.micro_batches[first : first + turns]
            micros = [
                make_micro_batch(
                    sequences, first + i, seated.table, self.comm, padded=self.options.layout == "padded",
                    memory=self._memory_for(sequences), seat_strength=self.options.seat_strength(self.step),
                ) for i, sequences in enumerate(group)
            ]  # fmt: skip
            recorder.active = recording
            output: ModelOutput | tuple[ModelOutput, ...] = self.sync(*micros, last=first + turns >= A)
            outputs = output if isinstance(output, tuple) else (output,)
            if recording:
                done.traced.append(recorder.finish(self.comm, self.step + 1, micros[0].tokens))
            torch.stack([output.loss for output in outputs]).sum().backward()
            done.layouts += [micro.layout for micro in micros]
            for output in outputs:
                token_loss += output.token_loss
                done.routers = _added(done.routers, output)
                if self.memory is not None:
                    self.memory = output.memory
        self.sync.finish()
        return token_loss

    def _forward_again(self) -> None:
        """The forward pass of this step once more, without gradient and without segment recurrence."""
        for m in range(self.options.num_micro_batches):
            sequences = self._read(self.step * self.options.num_micro_batches + m, self.mesh.rank, self.mesh.world_size)
            self.model(self._alone(sequences, self._empty_memory(len(sequences))))

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, micro_batches: int | None = None) -> float:
        """Mean held-out loss over `eval_batches` batches (or so many micro-batches), each weighted by its labels."""
        total, labels = 0.0, 0
        memory = self._empty_memory(self.loader.global_batch_size // self.mesh.world_size)
        batches = self.valid_loader.eval_batches(
            micro_batches or self.options.num_eval_micro_batches, self.mesh.rank, self.mesh.world_size
        )
        for batch in batches:
            micro = self._alone([self._mask(s) for s in batch], memory)
            output = self.model(micro)
            memory = output.memory if memory is not None else None
            loss = self.comm.all_reduce(output.token_loss.to(torch.float64).clone())
            total += float(loss) * micro.step_labels
            labels += micro.step_labels
        self.comm.meter.take()  # evaluation is not part of a step's traffic
        self.runtime.tally.take()
        self.measure.plans()
        return total / max(labels, 1)


def _added(routers: RouterTotals | None, output: ModelOutput) -> RouterTotals | None:
    if output.aux is None:
        return routers
    return output.aux.totals if routers is None else routers + output.aux.totals
