"""The trainer: a run from its options to its summary, the same code on one rank and on many.

A run is a pure function of its options and its data: weights come from (seed, name), sequences from (seed, step), seats
from what was learnt by then, so a resumed run continues exactly where the checkpoint stood. The one thing measured, the
cost of attention, can only change where sequences are rebuilt, hence the order of summation; it is kept in the
checkpoint (luffy.train.attention).
"""

from __future__ import annotations

import resource
from pathlib import Path
from typing import Any

import torch

from luffy.lab.place import Lab, current_lab
from luffy.model.ownership import check_model as check_weights_alike
from luffy.report.runs import METRICS_FILE
from luffy.report.units import format_loss
from luffy.train import ranklog, stopping
from luffy.train.attention import AttentionFit, attention_for_planning
from luffy.train.beginning import changes_on_resume, check_model
from luffy.train.checkpoint import load_checkpoint, newest_sound, prepare_optimizer, read_meta, training_state
from luffy.train.export import export_safetensors, load_safetensors
from luffy.train.loggers import open_loggers
from luffy.train.metrics import MetricsWriter, RunSummary, describe_machine, read_metrics, write_json_atomic
from luffy.train.parts.saving import load_states, states_of
from luffy.train.progress import TrainProgress
from luffy.train.rates import measure_experts, measure_links
from luffy.train.steps import Steps


class Trainer(Steps):
    """One rank's part in a training run. Make it on every rank of an initialised world, then call `run`."""

    # ---------------------------------------------------------------- checkpoints

    @property
    def checkpoints(self) -> Path:
        return self.out / "checkpoints"

    def _state(self) -> dict[str, Any]:
        return training_state(self.model, self.optimizer, self.memory)

    def save(self) -> None:
        """Write a checkpoint, unless --keep-checkpoints is 0."""
        values, tensors = states_of(self.parts)
        self.comm.meter.take()  # putting states together is not part of a step's traffic
        meta = {
            "model": self.config.to_dict(),
            "options": self.options.to_dict(),
            "ep_size": self.mesh.ep_size,
            "world_size": self.mesh.world_size,
            "valid_loss": self.valid_loss,
            "attention_fit": self._attention_fit(),
            "expert_flops": self.expert_flops,
            "parts": values,
            "data": self.data_facts,
        }
        self.ops.save(self.step, self._state(), meta, self.optimizer, self._loss_now, tensors)

    def _loss_now(self) -> float:
        """A loss that the weights give now, of a held-out micro-batch or else of the next one."""
        if self.valid_loader is not None:
            return self.evaluate(1)
        with torch.no_grad():
            output = self.model(self.read_micro_batch(self.step, 0))
        return float(self.comm.all_reduce(output.token_loss.to(torch.float64).clone()))

    def _attention_fit(self) -> dict[str, Any] | None:
        return None if self.attention_fit is None else self.attention_fit.to_dict()

    def restore(self, path: Path) -> None:
        """Continue from `path`. Raises UserError when it is damaged or belongs to another model or data order."""
        meta = read_meta(path)
        check_model(path, meta["model"], self.config)
        self.changes = changes_on_resume(path, meta, self.options.to_dict(), self.data_facts)
        prepare_optimizer(self.optimizer)
        load_checkpoint(path, self._state(), self.mesh)
        self.step, self.valid_loss = meta["step"], meta["valid_loss"]
        self.ops.guard.skipped = meta.get("skipped_steps", 0)
        load_states(self.parts, meta.get("parts", {}), path)
        self.expert_flops = meta.get("expert_flops")
        fit = meta.get("attention_fit")
        self.attention_fit = None if fit is None else AttentionFit.from_dict(fit)

    # ---------------------------------------------------------------- the run

    def run(self) -> RunSummary | None:
        """Train to the last step, writing as it goes; the summary on rank 0, None elsewhere."""
        o, first = self.options, self.mesh.rank == 0
        found = newest_sound(self.checkpoints, self.mesh, ranklog.tell) if o.resume else None
        if found:
            self.restore(found)
        elif o.start_weights is not None:
            load_safetensors(self.model, Path(o.start_weights))
        check_weights_alike(self.model, self.mesh)
        self.prepare()
        writer = None
        if first:
            loggers = open_loggers(o.log, self.out, o.to_dict())
            writer = MetricsWriter(self.out, self.step if found else None, tensorboard=o.tensorboard, loggers=loggers)
            about = {"options": o.to_dict(), "model": self.config.to_dict(), "attention_fit": self._attention_fit()}
            write_json_atomic(self.out / "config.json", about)
        before = read_metrics(self.out / METRICS_FILE) if first and found else []
        try:
            with TrainProgress(o.steps, start_step=self.step, records=before, enabled=first) as progress:
                if o.resume and first:
                    note = f"resuming after step {self.step}" if found else "no checkpoint in --out: starting anew"
                    for line in (note, *self.changes):
                        progress.message(line)
                with stopping.at_step_ends():
                    self._loop(writer, progress)
        finally:
            self.reader.close()
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
        """Give shadows the rates that they weigh: of experts as in the checkpoint, else measured now."""
        state, o, mesh = self.runtime.residency, self.options, self.mesh
        if state is None or self.runtime.recipe.residency != "shadow" or not self.model.moe_layers:
            return
        if self._links() is None:
            state.topology = measure_links(self.comm, state.topology)
        if self.expert_flops is None:
            length = o.sequence_length or self.config.max_sequence_length
            rows = o.batch_size // (o.num_micro_batches * mesh.world_size) * length * self.config.router.top_k
            self.expert_flops = measure_experts(self.model.moe_layers[0].experts, rows, dtype, self.comm)
        state.flops_per_second = self.expert_flops
        self.comm.meter.take()  # agreeing is not part of a step's traffic

    def _loop(self, writer: MetricsWriter | None, progress: TrainProgress) -> None:
        o = self.options
        saved = self.step
        while self.step < o.steps:
            record = self.train_step()
            last, stops = self.step == o.steps, self.ops.stops
            if self.ops.warning:
                progress.message(self.ops.warning)
            note = ""
            if self.valid_loader is not None and (last or (o.eval_every and self.step % o.eval_every == 0)):
                self.valid_loss = record["valid_loss"] = self.evaluate()
                note = f"held-out loss {format_loss(self.valid_loss)}"
            if "auto" in record:
                progress.message(record["auto"]["note"])
            if writer is not None:
                writer.write(record)
            moved = sum(record["bytes"].values())
            progress.step(
                self.step, loss=record["loss"], tokens=record["tokens"], seconds=record["seconds"],
                num_bytes=moved, note=note,
            )  # fmt: skip
            if last or stops or (o.checkpoint_every and self.step % o.checkpoint_every == 0):
                if writer is not None:
                    writer.sync()
                self.save()
                saved = self.step
            if stops and not last:
                self.ops.stop(self.step)
        if saved != self.step:
            self.save()
        self.ops.writer.finish()

    def _peak_memory(self) -> int:
        if self.mesh.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.mesh.device)
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    def _summarise(self) -> RunSummary | None:
        peak = torch.zeros(self.mesh.world_size, dtype=torch.int64, device=self.mesh.device)
        peak[self.mesh.rank] = self._peak_memory()
        highest = int(self.comm.all_reduce(peak).max())
        traffic = self.comm.all_gather_world(torch.from_numpy(self.measure.sent).to(self.mesh.device)).tolist()
        if self.mesh.rank != 0:
            return None
        summary = RunSummary.from_records(
            read_metrics(self.out / METRICS_FILE),
            recipe=self.options.recipe,
            model=self.options.model,
            world_size=self.mesh.world_size,
            peak_memory_bytes=highest,
            extra={
                "seed": self.options.seed,
                "ep_size": self.mesh.ep_size,
                "dtype": self.dtype_name,
                "environment": describe_machine(self.mesh.device.type),
                "traffic": {
                    "steps": self.measure.sent_steps,
                    "bytes": traffic,
                },  # [from][to]; steps since the last resume
                **({} if self.attention_fit is None else {"attention_fit": self._attention_fit()}),
                **(_in_lab(lab) if (lab := current_lab()) else {}),
            },
        )
        summary.write(self.out)
        return summary


def _in_lab(lab: Lab) -> dict[str, Any]:
    """What a report needs to know of a run behind emulated links."""
    return {"lab": lab.describe(), "provenance": "emulated", "network": lab.network}
