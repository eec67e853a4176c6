"""The trainer: a run from its options to its summary, the same code on one rank and on many.

    step:  read sequences -> agree on their lengths -> forward, backward (exchange inside) -> sum gradients
           -> clip -> AdamW -> move the loss-free bias -> write metrics

A run is a pure function of its options and its data: weights come from (seed, name), sequences from (seed, step), so
a resumed run continues exactly where the checkpoint stood. The one thing measured, the cost of attention, can only
change where sequences are rebuilt, hence the order of summation; it is kept in the checkpoint (luffy.train.attention).
"""

from __future__ import annotations

import math
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from luffy.comm import Comm, Mesh
from luffy.comm.clock import PHASES
from luffy.comm.meter import DIRECTIONS, LINK_CLASSES, by_direction, by_link
from luffy.data import mask_for_mlm
from luffy.data.loader import Sequence
from luffy.errors import UserError
from luffy.lab.place import Lab, current_lab
from luffy.model import ModelOutput, Runtime, build_model
from luffy.model.aux_loss import AuxLoss
from luffy.plan.topology import Topology, parse_topology
from luffy.plan.trace import RoutingTrace, TraceStep
from luffy.train.attention import AttentionFit, attention_for_planning
from luffy.train.auto import AutoControl
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.checkpoint import (
    list_checkpoints,
    load_checkpoint,
    prepare_optimizer,
    read_meta,
    save_checkpoint,
    training_state,
)
from luffy.train.condensing import CondenseControl
from luffy.train.export import export_safetensors, load_safetensors
from luffy.train.gradients import GradientSync, make_optimizer
from luffy.train.loggers import open_loggers
from luffy.train.metrics import MetricsWriter, RunSummary, describe_machine, read_metrics, write_json_atomic
from luffy.train.options import TrainOptions
from luffy.train.progress import TrainProgress, phase
from luffy.train.rates import half_of_memory, measure_experts, measure_links, parse_num_bytes
from luffy.train.reading import read_data
from luffy.train.rehoming import Rehomed, current_owners, num_recorded, rehome, wire_of

LOAD_EVERY = 10  # steps between records of the load of every expert of every layer


class Trainer:
    """One rank's part in a training run. Make it on every rank of an initialised world, then call `run`."""

    def __init__(self, options: TrainOptions, mesh: Mesh) -> None:
        self.options, self.mesh = options, mesh
        self.out = Path(options.out)
        self.comm = Comm.create(mesh)
        options.check_world(mesh.world_size)
        self.micro_size = options.batch_size // options.num_micro_batches
        self.dtype_name = options.dtype
        if options.dtype == "auto":
            self.dtype_name = "bfloat16" if mesh.device.type == "cuda" else "float32"
        self._load_data()
        self.model = self._build_model()
        self.config, self.runtime = self.model.config, self.model.runtime
        self.expert_flops: float | None = None
        self.auto: AutoControl | None = None
        self._chosen: dict[str, Any] | None = None  # by `auto`, before a resume
        if self.runtime.residency is not None:
            limit = options.fetch_limit
            self.runtime.residency.limit_num_bytes = (
                half_of_memory(mesh.device, mesh.world_size)
                if limit is None
                else parse_num_bytes(limit, "--fetch-limit")
            )
        self.clock = self.runtime.clock
        fused = mesh.device.type == "cuda"
        self.optimizer = make_optimizer(self.model, options.lr, options.weight_decay, fused)
        self.sync = GradientSync(self.model, self.comm, options.gradient_dtype, self.clock)
        self.memory = self._empty_memory(self.micro_size // mesh.world_size)
        self.step = 0
        self.valid_loss: float | None = None
        self.attention_fit: AttentionFit | None = None
        self.condensing = CondenseControl(self.runtime.condense, options)
        # Rows and experts sent to each rank since this process began: this rank's row of the traffic matrix.
        self._sent, self._sent_steps = np.zeros(mesh.world_size, dtype=np.int64), 0

    def _load_data(self) -> None:
        """Set `config`, `mask_id`, `loader` and `valid_loader`."""
        with phase("prepare data", enabled=self.mesh.rank == 0) as progress:
            reading = read_data(self.options, progress)
        self.config, self.mask_id = reading.config, reading.mask_id
        self.loader, self.valid_loader = reading.loader, reading.valid_loader

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

    def _empty_memory(self, num_sequences: int) -> tuple[torch.Tensor, ...] | None:
        """Zeros for segment recurrence: one [S, M, D] per block."""
        cfg = self.config
        if not cfg.memory_length:
            return None
        shape = (num_sequences, cfg.memory_length, cfg.hidden_size)
        dtype, device = self.model.stream_dtype, self.mesh.device
        return tuple(torch.zeros(shape, dtype=dtype, device=device) for _ in range(cfg.num_layers))

    # ---------------------------------------------------------------- one step

    def _read(self, loader_step: int) -> list[Sequence]:
        sequences = self.loader.batch(loader_step, self.mesh.rank, self.mesh.world_size)
        return [self._mask(s) for s in sequences]

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
        begin, A, turns = time.perf_counter(), self.options.num_micro_batches, 2 if self.options.overlap else 1
        self.clock.start()
        rehomed = self._rehome()
        self.condensing.before(self.step)
        self.runtime.draws.begin(self.step)
        if self.auto is not None:
            self.auto.before(self.step)
        writes_trace = self.options.trace_every and (self.step + 1) % self.options.trace_every == 0
        tracing = bool(writes_trace or (self.auto is not None and self.auto.decides_after(self.step)))
        traced: list[TraceStep] = []
        micro_batches = [self._read(self.step * A + m) for m in range(A)]
        announced = gather_step(micro_batches, self.comm)
        token_loss = torch.zeros((), dtype=torch.float64, device=self.mesh.device)
        aux: AuxLoss | None = None
        condensed: torch.Tensor | None = None
        if tracing:
            turns = 1  # one at a time is recorded
        for m in range(0, A, turns):
            micros = [
                make_micro_batch(
                    micro_batches[i], i, announced, self.comm,
                    padded=self.options.layout == "padded", memory=self._memory_for(micro_batches[i]),
                ) for i in range(m, m + turns)
            ]  # fmt: skip
            self.runtime.recorder.active = tracing
            output: ModelOutput | tuple[ModelOutput, ...] = self.sync(*micros, last=m + turns == A)
            outputs = output if isinstance(output, tuple) else (output,)
            if tracing:
                traced.append(self.runtime.recorder.finish(self.comm, self.step + 1))
            torch.stack([output.loss for output in outputs]).sum().backward()
            for output in outputs:
                token_loss += output.token_loss
                aux = output.aux
                if aux is not None:
                    condensed = aux.condensed if condensed is None else condensed + aux.condensed
                if self.memory is not None:
                    self.memory = output.memory
        self.sync.finish()
        norm = self.sync.clip(self.options.clip_norm)
        lr = self.learning_rate(self.step + 1)
        totals = self._share(token_loss, aux, norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._move_choice_bias(aux)
        if self.runtime.residency is not None:
            totals["residency"] = self.runtime.residency.take()
        totals |= self._planning() | self.condensing.after(totals["loss"], condensed)
        self.step += 1
        if writes_trace:
            self._write_trace(traced)
        if rehomed is not None:
            totals["rehoming"] = rehomed.to_dict()
        record = {"step": self.step, **totals, "lr": lr, "seconds": time.perf_counter() - begin}
        record["tokens"] = int(announced[:, :, 1:].sum())
        if self.auto is not None:
            record["mode"] = self.auto.mode.name
            plain = not tracing and rehomed is None
            if (choice := self.auto.after(self.step - 1, record, traced, plain)) is not None:
                record["auto"] = choice
        return record

    @torch.no_grad()
    def _rehome(self) -> Rehomed | None:
        """Re-home experts if it is time: see luffy.train.rehoming. Routers that were never trained have no home."""
        o, every = self.options, self.options.get_rehome_every()
        untrained = self.step == 0 and o.start_weights is None
        if not every or untrained or self.step % every or self.mesh.ep_size == 1 or not self.model.moe_layers:
            return None
        recorded = []
        with self.comm.meter.charging("experts"):
            each = o.batch_size // (o.num_micro_batches * self.mesh.dp_size)
            for m in range(num_recorded(each, self.config.router.num_experts)):
                sequences = self._read(self.step * o.num_micro_batches + m)
                announced = gather_step([sequences], self.comm)
                padded = o.layout == "padded"
                memory = self._memory_for(sequences)
                micro = make_micro_batch(sequences, 0, announced, self.comm, padded=padded, memory=memory)
                self.runtime.recorder.active = True
                self.model(micro)
                recorded.append(self.runtime.recorder.finish(self.comm, self.step))
            rehomed = rehome(
                self.model,
                self.optimizer,
                recorded,
                padded=o.layout == "padded",
                micro_batches=o.num_micro_batches,
                steps_until_next=min(every, o.steps - self.step),
            )
        self._planning()  # the recording's plans are not the step's
        return rehomed

    def _write_trace(self, steps: list[TraceStep]) -> None:
        """One file a traced step, by the first rank, of its EP group's micro-batches."""
        if self.mesh.rank != 0:
            return
        o, router = self.options, self.config.router
        about = {"model": o.model, "recipe": o.recipe, "seed": o.seed, "data": o.data, "ep_size": self.mesh.ep_size}
        wire = wire_of(self.model, o.layout == "padded")
        about["expert_num_bytes"] = wire.expert_num_bytes
        trace = RoutingTrace(
            tuple(steps),
            num_experts=router.num_experts,
            top_k=router.top_k,
            hidden_size=self.config.hidden_size,
            row_num_bytes=wire.row_num_bytes,
            owners=current_owners(self.model),
            about=about,
        )
        trace.save(self.out / "trace" / f"step-{self.step:08d}.npz")

    def _planning(self) -> dict[str, Any]:
        """What placing sequences came to in this step, as this rank saw it; nothing for recipes that move none."""
        planner, meter = self.runtime.planner, self.comm.meter
        exposed, meter.exposed_seconds = meter.exposed_seconds, 0.0
        if planner is None:
            return {}
        tally = planner.tally.take()
        share = tally.moved / max(1, tally.sequences)
        return {
            "plan": {
                "moved_share": share,
                "seconds": tally.seconds,
                "exposed_seconds": exposed,
                "wait_seconds": tally.wait_seconds,
            },
            "tokens_max_over_mean": tally.tokens_max_over_mean,
        }

    def _share(self, token_loss: torch.Tensor, aux: AuxLoss | None, norm: torch.Tensor) -> dict[str, Any]:
        """Sum what ranks counted, in one small all-reduce, and stop everywhere if a number is not finite."""
        self._sent, self._sent_steps = self._sent + self.comm.meter.read_to_rank(), self._sent_steps + 1
        seconds, counts = self.clock.take(), self.comm.meter.take()
        # What was under way and not waited for; the phase includes packing rows, so this is what was hidden at least.
        under_way = self.comm.meter.take_under_way()
        hidden = max(0.0, under_way - seconds["exchange"])
        mine = np.concatenate([[seconds[p] for p in PHASES], [under_way, hidden], counts.reshape(-1)])
        packed = torch.cat([token_loss[None], torch.from_numpy(mine).to(self.mesh.device)])
        # The sum's own bytes belong to the next step: its counts are already on their way.
        values = self.comm.all_reduce(packed).tolist()
        grad_norm = float(norm)
        if not math.isfinite(values[0]) or not math.isfinite(grad_norm):
            self._stop_not_finite(values[0], grad_norm, aux)
        n = 1 + len(PHASES)
        means = [v / self.mesh.world_size for v in values[1 : n + 2]]
        split = dict(zip(PHASES, means, strict=False))
        shape = (len(DIRECTIONS), len(LINK_CLASSES))
        traffic = np.array(values[n + 2 :]).round().astype(np.int64).reshape(shape)
        record: dict[str, Any] = {
            "loss": values[0],
            "grad_norm": grad_norm,
            "bytes": by_direction(traffic),
            "bytes_by_link": by_link(traffic),
            "seconds_split": split,
        }
        if means[-2] > 0:
            record["exchange_under_way_seconds"], record["exchange_hidden_seconds"] = means[-2:]
        if aux is not None:
            record |= {
                "balance": float(aux.balance),
                "router_z": float(aux.z.mean()),
                "dropped": float(aux.dropped),
                "locality": {
                    "sequence_entropy": float(aux.sequence_entropy.mean()),
                    "expert_entropy": float(aux.expert_entropy.mean()),
                    "favourite_rank_share": float(aux.favourite_share.mean()),
                },
            }
            if (self.step + 1) % LOAD_EVERY == 0 or self.step + 1 == self.options.steps:
                record["favourite_rank_share"] = [round(x, 5) for x in aux.favourite_share.tolist()]
                record["expert_load"] = [[round(x, 5) for x in row] for row in aux.load.tolist()]
        return record

    def _stop_not_finite(self, loss: float, grad_norm: float, aux: AuxLoss | None) -> None:
        where = ""
        if aux is not None:
            bad = [i for i, z in enumerate(aux.z.tolist()) if not math.isfinite(z)]
            where = f"; first seen in the router of MoE layer {bad[0]}" if bad else ""
        raise UserError(
            f"step {self.step + 1}: loss {loss}, gradient norm {grad_norm}{where}. No update was made; lower --lr "
            "or set --clip-norm, and continue from the last checkpoint with --resume"
        )

    def _move_choice_bias(self, aux: AuxLoss | None) -> None:
        """Loss-free balancing (arXiv 2408.15664): raise the bias of experts that were chosen too rarely."""
        rate = self.config.router.bias_update_rate
        if aux is None or rate == 0:
            return
        for layer, load in zip(self.model.moe_layers, aux.load, strict=True):
            layer.router.raise_bias(rate * torch.sign(load.mean() - load))

    # ---------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self) -> float:
        """Mean held-out loss over `eval_batches` batches, each weighted by its labels."""
        total, labels = 0.0, 0
        memory = self._empty_memory(self.loader.global_batch_size // self.mesh.world_size)
        batches = self.valid_loader.eval_batches(
            self.options.num_eval_micro_batches, self.mesh.rank, self.mesh.world_size
        )
        for batch in batches:
            sequences = [self._mask(s) for s in batch]
            announced = gather_step([sequences], self.comm)
            padded = self.options.layout == "padded"
            micro = make_micro_batch(sequences, 0, announced, self.comm, padded=padded, memory=memory)
            output = self.model(micro)
            memory = output.memory if memory is not None else None
            loss = self.comm.all_reduce(output.token_loss.to(torch.float64).clone())
            total += float(loss) * micro.step_labels
            labels += micro.step_labels
        self.comm.meter.take()  # evaluation is not part of a step's traffic
        self._planning()
        return total / max(labels, 1)

    # ---------------------------------------------------------------- checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _state(self) -> dict[str, Any]:
        return training_state(self.model, self.optimizer, self.memory)

    def save(self) -> None:
        """Write a checkpoint, unless --keep-checkpoints is 0."""
        meta = {
            "model": self.config.to_dict(),
            "options": self.options.to_dict(),
            "ep_size": self.mesh.ep_size,
            "world_size": self.mesh.world_size,
            "valid_loss": self.valid_loss,
            "attention_fit": self._attention_fit(),
            "condensing": self.condensing.to_dict(),
            "expert_flops": self.expert_flops,
            "auto": None if self.auto is None else self.auto.to_dict(),
        }
        keep = self.options.keep_checkpoints
        if not keep:
            return
        save_checkpoint(self.checkpoints, self.step, self._state(), meta, self.mesh, keep)

    def _attention_fit(self) -> dict[str, Any] | None:
        return None if self.attention_fit is None else self.attention_fit.to_dict()

    def restore(self, path: Path) -> None:
        """Continue from `path`. Raises UserError when it is damaged or belongs to another model or data order."""
        meta = read_meta(path)
        if meta["model"] != self.config.to_dict():
            new, old = self.config.to_dict(), meta["model"]
            differing = sorted(k for k in new if new[k] != old.get(k))
            raise UserError(f"--resume: {path} holds a model with other settings ({', '.join(differing)})")
        for name in ("seed", "batch_size", "accumulate", "overlap", "sequence_length", "sequence_mode"):
            before, now = meta["options"].get(name, False), getattr(self.options, name)
            if before != now:
                option = "--" + name.replace("_", "-")
                raise UserError(f"--resume: the run began with {option} {before}, not {now}; give it again as it was")
        prepare_optimizer(self.optimizer)
        load_checkpoint(path, self._state(), self.mesh)
        self.step, self.valid_loss = meta["step"], meta["valid_loss"]
        self.condensing.restore(meta.get("condensing"))
        self.expert_flops, self._chosen = meta.get("expert_flops"), meta.get("auto")
        fit = meta.get("attention_fit")
        self.attention_fit = None if fit is None else AttentionFit.from_dict(fit)

    # ---------------------------------------------------------------- the run

    def run(self) -> RunSummary | None:
        """Train to the last step, writing as it goes; the summary on rank 0, None elsewhere."""
        o, first = self.options, self.mesh.rank == 0
        found = list_checkpoints(self.checkpoints) if o.resume else []
        if found:
            self.restore(found[-1])
        elif o.start_weights is not None:
            load_safetensors(self.model, Path(o.start_weights))
        self.prepare()
        writer = None
        if first:
            loggers = open_loggers(o.log, self.out, o.to_dict())
            writer = MetricsWriter(self.out, self.step if found else None, tensorboard=o.tensorboard, loggers=loggers)
            about = {"options": o.to_dict(), "model": self.config.to_dict(), "attention_fit": self._attention_fit()}
            write_json_atomic(self.out / "config.json", about)
        try:
            with TrainProgress(o.steps, start_step=self.step, enabled=first) as progress:
                if o.resume and first:
                    note = f"resuming after step {self.step}" if found else "no checkpoint in --out: starting anew"
                    progress.message(note)
                self._loop(writer, progress)
        finally:
            if writer is not None:
                writer.close()
        self._export()
        return self._summarise()

    def _export(self) -> None:
        if self.options.export:
            export_safetensors(self.model, self.out / "model.safetensors")

    def prepare(self) -> None:
        """Measure what plans of this run weigh, unless a checkpoint knew it: on all ranks, before the first step."""
        dtype = getattr(torch, self.dtype_name)
        fit = attention_for_planning(self.options, self.config, self.runtime, dtype, self.attention_fit)
        self.attention_fit = fit
        self._measure_rates(dtype)

    def _measure_rates(self, dtype: torch.dtype) -> None:
        """Give shadows and `auto` the rates that they weigh: of experts as in the checkpoint, else measured now."""
        state, o, mesh, recipe = self.runtime.residency, self.options, self.mesh, self.runtime.recipe
        if state is None or not (recipe.auto or recipe.residency == "shadow") or not self.model.moe_layers:
            return
        if recipe.auto or self._links() is None:
            state.topology = measure_links(self.comm, state.topology)
        if self.expert_flops is None:
            length = o.sequence_length or self.config.max_sequence_length
            rows = o.batch_size // (o.num_micro_batches * mesh.world_size) * length * self.config.router.top_k
            self.expert_flops = measure_experts(self.model.moe_layers[0].experts, rows, dtype, self.comm)
        state.flops_per_second = self.expert_flops
        if recipe.auto:
            experts = self.model.moe_layers[0].experts
            pair = 6 * sum(p[0].numel() for p in experts.parameters()) / self.expert_flops
            self.auto = AutoControl(
                self.model, self.comm, state.topology, pair, steps=o.steps, every=o.auto_every,
                padded=o.layout == "padded",
            )  # fmt: skip
            if self._chosen is not None:
                self.auto.restore(self._chosen)
        self.comm.meter.take()  # agreeing is not part of a step's traffic

    def _loop(self, writer: MetricsWriter | None, progress: TrainProgress) -> None:
        o = self.options
        saved = self.step
        while self.step < o.steps:
            record = self.train_step()
            last = self.step == o.steps
            note = ""
            if self.valid_loader is not None and (last or (o.eval_every and self.step % o.eval_every == 0)):
                self.valid_loss = record["valid_loss"] = self.evaluate()
                note = f"held-out loss {self.valid_loss:.4f}"
            if writer is not None:
                writer.write(record)
            moved = sum(record["bytes"].values())
            progress.step(
                self.step, loss=record["loss"], tokens=record["tokens"], seconds=record["seconds"],
                num_bytes=moved, note=note,
            )  # fmt: skip
            if last or (o.checkpoint_every and self.step % o.checkpoint_every == 0):
                if writer is not None:
                    writer.sync()
                self.save()
                saved = self.step
        if saved != self.step:
            self.save()

    def _peak_memory(self) -> int:
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _summarise(self) -> RunSummary | None:
        peak = torch.zeros(self.mesh.world_size, dtype=torch.int64, device=self.mesh.device)
        peak[self.mesh.rank] = self._peak_memory()
        highest = int(self.comm.all_reduce(peak).max())
        traffic = self.comm.all_gather_world(torch.from_numpy(self._sent).to(self.mesh.device)).tolist()
        if self.mesh.rank != 0:
            return None
        summary = RunSummary.from_records(
            read_metrics(self.out / "metrics.jsonl"),
            recipe=self.options.recipe,
            model=self.options.model,
            world_size=self.mesh.world_size,
            peak_memory_bytes=highest,
            extra={
                "seed": self.options.seed,
                "ep_size": self.mesh.ep_size,
                "dtype": self.dtype_name,
                "environment": describe_machine(self.mesh.device.type),
                "traffic": {"steps": self._sent_steps, "bytes": traffic},  # [from][to]; steps since the last resume
                **({} if self.attention_fit is None else {"attention_fit": self._attention_fit()}),
                **(_in_lab(lab) if (lab := current_lab()) else {}),
            },
        )
        summary.write(self.out)
        return summary


def _in_lab(lab: Lab) -> dict[str, Any]:
    """What a report needs to know of a run behind emulated links."""
    return {"lab": lab.describe(), "provenance": "emulated", "network": lab.network}
