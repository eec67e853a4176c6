"""Checkpoints: written whole or not at all, kept N deep, readable at another number of ranks.

Tensors go through `torch.distributed.checkpoint`. Experts and their optimizer state are described to it as shards of
one tensor over the expert-parallel mesh; sharded weights (luffy.comm.sharding) are shards of one over the world as they
are. So it can hand them to any other number of ranks, sharded or not. A checkpoint is written beside its final name,
its files' sizes and checksums are recorded (luffy.train.checkpoint_files), and only then does it get that name; a kill
or a full disk at any moment leaves the previous one as it was.
"""

from __future__ import annotations

import contextlib
import datetime
import shutil
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException  # a BaseException: `except Exception` misses it
from torch.distributed.tensor import DTensor, Replicate, Shard

from luffy.comm import Mesh
from luffy.errors import StoppedError, UserError
from luffy.model import Transformer, expert_parameters
from luffy.train import checkpoint_files
from luffy.train.checkpoint_files import (
    FORMAT_VERSION,
    DamagedError,
    Reader,
    Writer,
    check_files,
    list_checkpoints,
)
from luffy.train.ranklog import say


def training_state(
    model: Transformer, optimizer: torch.optim.Optimizer, memory: tuple[Tensor, ...] | None
) -> dict[str, Any]:
    """Everything that training continues from, as a flat dict of tensors (what ranks share as DTensors)."""
    mesh = model.runtime.comm.mesh.device_mesh
    expert_layout = (Replicate(), Shard(0))
    experts = expert_parameters(model)

    def describe(name: str, tensor: Tensor) -> Any:
        if name in experts and tensor.dim() > 0:
            return DTensor.from_local(tensor.detach(), mesh, expert_layout, run_check=False)
        return tensor.detach()

    state: dict[str, Any] = {}
    for name, p in model.named_parameters():
        state[f"model.{name}"] = describe(name, p)
        for key, value in optimizer.state[p].items():
            state[f"optimizer.{name}.{key}"] = describe(name, value)
    for name, b in model.named_buffers():
        state[f"model.{name}"] = b.detach()
    for i, m in enumerate(memory or ()):
        state[f"memory.{i}"] = DTensor.from_local(m, mesh, (Shard(0), Shard(0)), run_check=False)
    return state


def prepare_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Give every parameter the state that its first step would make, so that there is something to load into."""
    for group in optimizer.param_groups:
        for p in group["params"]:
            if not optimizer.state[p]:
                step = torch.zeros((), dtype=torch.float32, device=p.device if group.get("fused") else "cpu")
                optimizer.state[p] = {
                    "step": step,
                    "exp_avg": torch.zeros_like(p),
                    "exp_avg_sq": torch.zeros_like(p),
                }


def everyone(mesh: Mesh, action: Callable[[], Any], only_first: bool = False) -> Any:
    """Run `action` (on rank 0 alone, or on all) and let every rank raise if one of them failed.

    A UserError is raised on all ranks. Any other error is raised as it is where it happened, and as a RuntimeError with
    its traceback on the others, which would wait for that rank otherwise.
    """
    result, failure = None, None
    fault: tuple[str | None, str | None] = (None, None)  # a line for the user, or the traceback of anything else
    if mesh.writes or not only_first:
        try:
            result = action()
        except UserError as error:
            fault = str(error), None
        except StoppedError:
            raise
        except (Exception, CheckpointException) as error:
            failure, fault = error, (None, traceback.format_exc())
    if only_first:
        shared: list[Any] = [result, fault]
        dist.broadcast_object_list(shared, src=0)
        result, faults = shared[0], [shared[1]]
    else:
        faults = [fault] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
    if failure is not None:
        raise failure
    for line, _ in faults:
        if line is not None:
            raise UserError(line)
    for rank, (_, text) in enumerate(faults):
        if text is not None:
            raise RuntimeError(f"rank {rank} failed:\n{text}")
    return result


@contextlib.contextmanager
def _quiet() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


class CheckpointWriter:
    """Writes checkpoints of one run to `folder`, a file system that all ranks share; every rank makes one.

    background: save from a copy of the state, while training goes on; otherwise `save` returns when all is written.
    A checkpoint is there when the next one begins, or `finish` returns; until then the one before stays.
    """

    def __init__(self, folder: Path, mesh: Mesh, keep: int, background: bool) -> None:
        self.folder, self.mesh, self.keep, self.background = folder, mesh, keep, background
        self._group: dist.ProcessGroup | None = None
        self._under_way: tuple[int, Writer, Any] | None = None

    def save(
        self, step: int, state: dict[str, Any], meta: dict[str, Any], tensors: dict[str, Tensor] | None = None
    ) -> None:
        """Begin to write `folder/step-XXXXXXXX`. Raises UserError, on every rank, when this or the one before fails.

        That is: when the disk is full or not writable. Earlier checkpoints are untouched then. tensors: of parts
        (luffy.train.parts.saving), the same on all ranks.
        """
        self.finish()
        everyone(self.mesh, lambda: clear_leftovers(self.folder), only_first=True)
        writer = Writer(self.folder / f"step-{step:08d}", {"step": step, **meta}, self.keep, tensors)
        if self._group is None:
            # Of its own: its collectives run beside the training's. A slow disk is no reason to give up.
            timeout = datetime.timedelta(hours=2)
            self._group = dist.new_group(backend="gloo", timeout=timeout)
        with _quiet():
            if not self.background:
                self._end(step, writer, lambda: dcp.save(state, storage_writer=writer, process_group=self._group))
                return
            future = dcp.async_save(state, storage_writer=writer, process_group=self._group)
        self._under_way = (step, writer, future)

    def has_failed(self) -> bool:
        """Whether the checkpoint under way is known here to have failed: `finish` will raise."""
        return self._under_way is not None and self._under_way[2].done() and self._under_way[2].exception() is not None

    def finish(self) -> None:
        """Wait until the checkpoint under way is there. Every rank calls it; raises as `save` does."""
        if self._under_way is None:
            return
        (step, writer, future), self._under_way = self._under_way, None
        self._end(step, writer, future.result)

    def _end(self, step: int, writer: Writer, wait: Callable[[], Any]) -> None:
        def action() -> None:
            try:
                wait()
            except (Exception, CheckpointException) as error:
                reason = disk_error(error)
                if reason is None:
                    raise
                raise UserError(
                    f"--out: checkpoint of step {step} not written to {self.folder}: {reason}; earlier checkpoints "
                    "are as they were"
                ) from error

        try:
            everyone(self.mesh, action)
        except Exception:  # of one rank, raised on all: nobody writes any more
            if self.mesh.writes:
                shutil.rmtree(writer.temporary, ignore_errors=True)
            raise
        say(f"checkpoint of step {step}")


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed run left half-written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for leftover in folder.glob("step-*.tmp"):
            shutil.rmtree(leftover)
    except OSError as error:
        raise UserError(f"--out: cannot write checkpoints to {folder}: {error.strerror}") from error


def read_meta(path: Path) -> dict[str, Any]:
    """The checkpoint's description; raises UserError when it is damaged or of another version."""
    try:
        meta = checkpoint_files.read_meta(path)
    except DamagedError as error:
        raise _damaged(path, str(error)) from error
    if meta.get("format") != FORMAT_VERSION:
        raise UserError(f"--resume: {path} was written by another version of luffy (format {meta.get('format')})")
    return meta


def newest_sound(folder: Path, mesh: Mesh, tell: Callable[[str], None]) -> Path | None:
    """The newest checkpoint that is whole; None where there is none at all. Every rank calls it.

    Damaged ones on the way are told of, and kept aside under another name. Raises UserError where all are damaged.
    """
    moved: list[str] = []
    while True:
        found = everyone(mesh, lambda: [str(p) for p in list_checkpoints(folder)], only_first=True)
        if not found:
            break
        path = Path(found[-1])
        fault = _fault(path, mesh)
        if fault is None:
            return path
        aside = path.with_name(f"damaged-{path.name}")

        def put_aside(path: Path = path, aside: Path = aside) -> None:
            shutil.rmtree(aside, ignore_errors=True)
            path.rename(aside)

        everyone(mesh, put_aside, only_first=True)
        moved.append(f"{path.name} ({fault})")
        if mesh.rank == 0:
            tell(f"checkpoint {path.name} is damaged ({fault}): kept aside as {aside.name}, trying the one before")
    if moved:
        raise UserError(
            f"--resume: every checkpoint in {folder} is damaged: {', '.join(moved)}; use --overwrite to start anew"
        )
    return None


def _fault(path: Path, mesh: Mesh) -> str | None:
    """What is wrong with the files of a checkpoint, the same on all ranks, each of which reads its share."""

    def check() -> str | None:
        try:
            meta = checkpoint_files.read_meta(path)
            if meta.get("format") == FORMAT_VERSION:
                check_files(path, meta["files"], mesh.rank, mesh.world_size)
        except DamagedError as error:
            return str(error)
        return None

    answers: list[str | None] = [None] * mesh.world_size
    dist.all_gather_object(answers, everyone(mesh, check))
    return next((a for a in answers if a is not None), None)


def load_checkpoint(path: Path, state: dict[str, Any], mesh: Mesh) -> dict[str, Any]:
    """Verify `path` and load it into the tensors of `state`, in place; returns its meta.

    Raises UserError on every rank when it is damaged or does not fit the model.
    """
    meta = everyone(mesh, lambda: read_meta(path))
    if fault := _fault(path, mesh):
        raise _damaged(path, fault)

    def read() -> None:
        try:
            with _quiet():
                dcp.load(state, storage_reader=Reader(str(path)))
        except (Exception, CheckpointException) as error:
            raise UserError(
                f"--resume: {path} does not fit this model and these options: {_last_line(error)}"
            ) from error

    everyone(mesh, read)
    return meta


def _damaged(path: Path, what: str) -> UserError:
    return UserError(f"--resume: checkpoint {path} is damaged ({what}); delete it to resume from the one before")


def disk_error(error: BaseException) -> str | None:
    """The system's words if a disk is behind this error, however deeply it is wrapped."""
    text = "".join(traceback.format_exception(error))
    for reason in (
        "No space left on device",
        "Disk quota exceeded",
        "Permission denied",
        "Read-only file system",
    ):
        if reason in text:
            return reason
    # torch's own writer reports a short write without the system's reason.
    return "the disk is full" if "unexpected pos" in text or "PytorchStreamWriter failed" in text else None


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1][:300] if lines else type(error).__name__
