"""transformers' Trainer, TRL's SFTTrainer, and their like, for models whose experts are spread over ranks.

    model = luffy.hf.load(FOLDER)
    trainer = luffy.hf.trainer_of(SFTTrainer)(model, ...)

The trainer keeps its loop, data, schedule, logging and callbacks. What is replaced is what takes every rank for a copy:
averaging (gradients are sums here), clipping (experts are elsewhere), the held-out loss, and files: `save_model` and
checkpoints hold a folder that transformers (or PEFT) opens, and beside it, in `luffy/`, what training continues from,
which every rank reads and writes its part of, at any number of ranks.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from luffy.errors import UserError
from luffy.hf.causal_lm import CausalLM, without
from luffy.hf.files import Checkpoint
from luffy.hf.loading import fill
from luffy.hf.model import ParallelModel
from luffy.train.checkpoint import (
    CheckpointWriter,
    everyone,
    list_checkpoints,
    load_checkpoint,
    prepare_optimizer,
    read_meta,
    training_state,
)

SEATS = "seats.pt"  # in a checkpoint: what is known of which sequences want which rank
STATE = "luffy"  # in a checkpoint: weights as they are trained, and the optimizer's moments
_KNOWN_LOSSES = {("transformers", "Trainer"), ("trl", "SFTTrainer")}  # the mean over labels
T = TypeVar("T")


def trainer_of(cls: type[T]) -> type[T]:
    """`cls`, transformers' Trainer or a class made from it, for parallel models.

    UserError for a class with a loss of its own: the model's is the one that is computed where sequences are.
    """
    owner = next(c for c in cls.__mro__ if "compute_loss" in vars(c))
    if (owner.__module__.split(".")[0], owner.__name__) not in _KNOWN_LOSSES:
        raise UserError(
            f"trainer_of({cls.__name__}): {owner.__name__}.compute_loss needs log-probabilities or logits with their "
            "gradients on the rank that read a row; where experts are spread over ranks a model gives its loss alone"
        )
    return type(cls.__name__, (_ParallelTrainer, cls), {"__doc__": cls.__doc__, "__module__": cls.__module__})


class _ParallelTrainer:
    """What goes before a Trainer's own methods."""

    def __init__(self, model: Any, args: Any = None, *rest: Any, **more: Any) -> None:
        if not isinstance(model, ParallelModel | CausalLM):
            raise UserError("trainer_of: the model must be one of luffy.hf.load or luffy.hf.parallelize")
        if args is not None:
            _check(args, more)
        view = model if isinstance(model, CausalLM) else CausalLM(model)
        parallel = view.parallel
        if args is not None and getattr(args, "bf16", False) and parallel.stream_dtype != torch.bfloat16:
            if parallel.units is not None:
                raise UserError('bf16=True: give stream_dtype=torch.bfloat16 to luffy.hf.load with dense="sharded"')
            parallel.stream_dtype = torch.bfloat16
        super().__init__(view, args, *rest, **more)  # type: ignore[call-arg]
        vars(view).pop("forward", None)  # TRL puts a head of its own before the model's
        if getattr(self, "aux_loss_enabled", False):  # TRL reads the weight anew
            parallel.library_balance = float(self.router_aux_loss_coef)  # type: ignore[attr-defined]

    model: Any
    args: Any
    accelerator: Any
    optimizer: Any
    lr_scheduler: Any
    state: Any
    current_gradient_accumulation_steps: int

    @property
    def _parallel(self) -> ParallelModel:
        parallel: ParallelModel = self.model.parallel
        return parallel

    def create_accelerator_and_postprocess(self) -> None:
        super().create_accelerator_and_postprocess()  # type: ignore[misc]
        self.accelerator.prepare_model = lambda model, **_: model

    # ---------------------------------------------------------------- loss and gradients

    def compute_loss(
        self, model: Any, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        comm = self._parallel.runtime.comm
        if num_items_in_batch is not None and not self.args.average_tokens_across_devices:
            num_items_in_batch = comm.all_reduce(torch.as_tensor(num_items_in_batch, device=comm.mesh.device))
        known = {n: inputs.get(n) for n in ("input_ids", "attention_mask", "labels", "position_ids")}
        outputs = model(
            **known,
            num_items_in_batch=num_items_in_batch,
            micro_batches=getattr(self, "current_gradient_accumulation_steps", 1),
            return_logits=return_outputs,
        )
        return (outputs.loss, outputs) if return_outputs else outputs.loss

    def training_step(self, *arguments: Any, **options: Any) -> Tensor:
        loss: Tensor = super().training_step(*arguments, **options)  # type: ignore[misc]
        if self.accelerator.sync_gradients:
            self.model.sync.finish()
            if self.model.seats is not None:
                self.model.seats.step()
        return loss * self.args.world_size  # the mean over ranks is what is shown

    def _clip_grad_norm(self, model: Any) -> Tensor:
        norm: Tensor = self.model.sync.clip(self.args.max_grad_norm)
        return norm

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> float:
        return float(self.model.sync.clip(0) if grad_norm is None else grad_norm)

    @torch.no_grad()
    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: Any = None
    ) -> tuple[Any, Any, Any]:
        """The mean loss of all ranks' rows, the same on all; rows that only fill the last batch up do not count."""
        inputs, comm = self._prepare_inputs(inputs), self._parallel.runtime.comm  # type: ignore[attr-defined]
        known = {n: inputs.get(n) for n in ("input_ids", "attention_mask", "labels", "position_ids")}
        labels, filling = known["labels"], self.accelerator.gradient_state
        if labels is not None and filling.end_of_dataloader and filling.remainder > 0:
            known["labels"] = without(labels, filling.remainder - comm.mesh.rank * len(labels))
        outputs = model(**known, return_logits=not prediction_loss_only)
        loss = None if outputs.loss is None else comm.all_reduce(outputs.loss.clone())
        return (loss, None, None) if prediction_loss_only else (loss, outputs.logits, labels)

    # ---------------------------------------------------------------- files

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        folder = Path(output_dir or self.args.output_dir)
        made = folder / ".saving"
        everyone(self._parallel.runtime.comm.mesh, lambda: _make(folder), only_first=True)
        self.model.save_pretrained(made)
        everyone(self._parallel.runtime.comm.mesh, lambda: _move(made, folder), only_first=True)
        if self.args.should_save:
            processing = getattr(self, "processing_class", None)
            if processing is not None:
                processing.save_pretrained(str(folder))
            torch.save(self.args, folder / "training_args.bin")
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save")  # type: ignore[attr-defined]

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        groups = [{k: v for k, v in g.items() if k != "params"} for g in self.optimizer.param_groups]
        mesh, folder = self._parallel.runtime.comm.mesh, Path(output_dir) / STATE
        writer = CheckpointWriter(folder, mesh, keep=1, background=False)
        writer.save(self.state.global_step, self._tensors(), {"groups": groups})
        kept = {"scheduler.pt": self.lr_scheduler.state_dict()}
        if self.model.seats is not None:
            kept[SEATS] = self.model.seats.state_dict()

        def write() -> None:
            for name, state in kept.items():
                torch.save(state, Path(output_dir) / name)

        everyone(mesh, write, only_first=True)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        """Nothing yet: weights come with the optimizer's state."""
        if not list_checkpoints(Path(resume_from_checkpoint) / STATE):
            raise UserError(
                f"resume_from_checkpoint: {resume_from_checkpoint} holds no training state (save_only_model, or saved "
                "without luffy); load its model and start anew"
            )

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        mesh, found = self._parallel.runtime.comm.mesh, list_checkpoints(Path(checkpoint) / STATE)[-1]
        prepare_optimizer(_inner(self.optimizer))
        load_checkpoint(found, self._tensors(), mesh)
        for group, saved in zip(self.optimizer.param_groups, read_meta(found)["groups"], strict=True):
            group |= {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}
        self.lr_scheduler.load_state_dict(torch.load(Path(checkpoint) / "scheduler.pt", weights_only=True))
        if self.model.seats is not None and (seats := Path(checkpoint) / SEATS).exists():
            self.model.seats.load_state_dict(torch.load(seats, weights_only=True))

    def _load_best_model(self) -> None:
        best = Path(self.state.best_model_checkpoint)
        states = list_checkpoints(best / STATE)
        if states:
            weights = {n: t for n, t in self._tensors().items() if n.startswith("model.")}
            load_checkpoint(states[-1], weights, self._parallel.runtime.comm.mesh)
        elif self.model.is_peft:
            raise UserError("load_best_model_at_end: adapters need whole checkpoints; leave save_only_model out")
        else:
            everyone(self._parallel.runtime.comm.mesh, lambda: fill(self._parallel, Checkpoint(best)))

    def _tensors(self) -> dict[str, Any]:
        return training_state(self._parallel, _inner(self.optimizer), None)  # type: ignore[arg-type]


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer within accelerate's."""
    inner: torch.optim.Optimizer = getattr(optimizer, "optimizer", optimizer)
    if not isinstance(inner, torch.optim.Adam | torch.optim.AdamW):
        raise UserError(
            f"optim: checkpoints know AdamW's state, not {type(inner).__name__}'s; set save_only_model=True"
        )
    return inner


def _check(args: Any, more: dict[str, Any]) -> None:
    """UserError for what takes ranks for copies, or changes the loss."""
    refused = {
        "fsdp": bool(args.fsdp), "deepspeed": bool(args.deepspeed), "fp16": args.fp16,
        "label_smoothing_factor": args.label_smoothing_factor != 0, "torch_compile": args.torch_compile,
        "compute_loss_func": more.get("compute_loss_func") is not None,
        "peft_config": more.get("peft_config") is not None, "neftune_noise_alpha": bool(args.neftune_noise_alpha),
        "auto_find_batch_size": args.auto_find_batch_size,
    }  # fmt: skip
    mends = {
        "fsdp": 'luffy.hf.load(..., dense="sharded") divides the other weights', "fp16": "use bf16",
        "peft_config": "give the PEFT model to luffy.hf.parallelize, or call model.adapt(rank)",
    }  # fmt: skip
    for name, is_set in refused.items():
        if is_set:
            raise UserError(
                f"{name} cannot be used where experts are spread over ranks; {mends.get(name, 'leave it out')}"
            )


def _make(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output_dir: {folder} cannot be made: {error.strerror}") from error


def _move(made: Path, folder: Path) -> None:
    """What was saved takes the place of an earlier model; all else in `folder` stays."""
    for old in [*folder.glob("model*.safetensors*"), *folder.glob("adapter_model*.safetensors")]:
        old.unlink()
    for file in made.iterdir():
        file.replace(folder / file.name)
    shutil.rmtree(made)
