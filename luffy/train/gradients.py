"""Gradients between ranks: what is replicated is summed over the world, experts over their copies.

Sharded weights (luffy.comm.sharding) have been summed by the backward pass itself. Of weights that tensor parallelism
splits over ranks outside this mesh, every rank sums its part with those who have the same part.

Replicated parameters go through DistributedDataParallel: buckets, overlapped with the backward pass. Its hook sums
instead of averaging, because the loss is already divided by the labels of all ranks. Experts of an EP group received
their rows' gradients from every rank of the group, so only their copies in other data-parallel groups are added,
each stacked tensor being a bucket of its own, as soon as its gradient is complete. `form`: how gradients are written
on the wire while they are summed (luffy.comm.sums).
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from luffy.comm import Comm
from luffy.comm.alike import check_alike, code_facts
from luffy.comm.clock import PhaseClock
from luffy.comm.sharding import is_sharded, is_split_apart, local_part
from luffy.comm.sums import GradientSums
from luffy.errors import UserError
from luffy.model import check_model, expert_parameters


class GradientSync:
    """Wraps a model for training. Call it for each forward pass; call `finish` after the last backward of a step.

    Gradients add up over the backward passes before `finish`. Without `last=False` on all calls but the last of a
    step they are summed over ranks after every backward pass: the same result, more on the wire. UserError where
    what was done before `finish` or `clip` would leave other gradients on other ranks.
    """

    def __init__(self, model: nn.Module, comm: Comm, form: str = "model", clock: PhaseClock | None = None) -> None:
        self.model, self.comm = model, comm
        self.clock, self._marked = clock, False
        self._under_way: list[torch.futures.Future[Tensor]] = []
        self._last = False  # until a forward pass says that it is
        self._summed: set[Tensor | int] = set()  # experts, and buckets, since the last call or `finish`
        self._holds_sums = False  # gradients, if there are any, include sums over ranks
        self._unsummed = False  # a backward pass came by that has not been summed
        self.module: nn.Module = model
        mesh = comm.mesh
        check_alike(code_facts() | {"--gradient-dtype": form}, mesh.device)
        check_model(model, mesh)
        stacked = expert_parameters(model)
        experts = [(n, p) for n, p in model.named_parameters() if n in stacked]
        apart = {n for n, p in model.named_parameters() if n in stacked or is_sharded(p)}
        # Under every name: DistributedDataParallel asks for those of a tied weight one by one.
        every_name = model.named_parameters(remove_duplicate=False)
        apart |= {n for n, p in every_name if is_sharded(p)} | set(expert_parameters(model, remove_duplicate=False))
        self._replicated = [p for n, p in model.named_parameters() if n not in apart and p.requires_grad]
        self._copied_experts = [p for _, p in experts if p.requires_grad] if mesh.dp_size > 1 else []
        self._split_apart = [p for p in model.parameters() if p.requires_grad and is_split_apart(p, comm)]
        if mesh.world_size > 1 and self._replicated:
            DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(model, list(apart))
            with warnings.catch_warnings():
                # `broadcast_buffers` is on its way out, but its successor does not exist in every release yet.
                warnings.simplefilter("ignore", FutureWarning)
                self.module = DistributedDataParallel(
                    model,
                    process_group=mesh.world_group,
                    broadcast_buffers=False,
                    init_sync=False,  # every rank initialised the same weights from (seed, name)
                    gradient_as_bucket_view=True,
                )
            sums = GradientSums(comm, mesh.world_group, range(mesh.world_size), form)
            self.module.register_comm_hook(sums, self._sum_bucket)
        self._sums_of: dict[Tensor, GradientSums] = {}
        for group, ranks, parameters in (
            (mesh.dp_group, mesh.dp_ranks, self._copied_experts),
            (mesh.world_group, list(range(mesh.world_size)), self._split_apart if mesh.world_size > 1 else []),
        ):
            if parameters:
                self._sums_of |= dict.fromkeys(parameters, GradientSums(comm, group, ranks, form))
        for p in self._sums_of:
            p.register_post_accumulate_grad_hook(self._sum_alone)
        for p in (self._replicated if self.module is not model else list(self._sums_of))[:1]:
            p.register_post_accumulate_grad_hook(self._note_backward)

    def _note_backward(self, parameter: Tensor) -> None:
        self._unsummed = True

    def __call__(self, *args: Any, last: bool = True) -> Any:
        """Forward. `last` says that this micro-batch's backward completes the step's gradients."""
        self._take_back()
        self._last, self._marked = last, False
        with self._no_sync() if not last else contextlib.nullcontext():
            return self.module(*args)

    @contextlib.contextmanager
    def _no_sync(self) -> Iterator[None]:
        if isinstance(self.module, DistributedDataParallel):
            with self.module.no_sync():
                yield
        else:
            yield

    def _take_back(self) -> None:
        """Leave sums of earlier backward passes to one rank, so that the next sum counts them once."""
        if not self._holds_sums:
            return
        self._wait()
        self._summed.clear()
        self._holds_sums = False
        mesh = self.comm.mesh
        replicated = [*self._replicated, *self._split_apart]
        for first, parameters in ((mesh.rank == 0, replicated), (mesh.dp_rank == 0, self._copied_experts)):
            for p in parameters:
                if p.grad is not None and not first:
                    p.grad.zero_()

    def _sum_bucket(self, sums: GradientSums, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
        self._summed.add(bucket.index())
        self._holds_sums = True
        self._mark_end_of_backward()
        return sums.start(bucket.buffer())

    def _mark_end_of_backward(self) -> None:
        """Let the phase "gradients" begin when the backward pass is over and only sums are waited for.

        Called for the first bucket: the wait is itself a callback at the end, and is queued after the last bucket.
        """
        if self.clock is not None and not self._marked:
            self._marked = True
            clock = self.clock
            torch.autograd.Variable._execution_engine.queue_callback(lambda: clock.switch("gradients"))

    def _sum_alone(self, parameter: Tensor) -> None:
        """A tensor that is a bucket of its own: stacked experts, or a part of a split weight."""
        if not self._last:
            return
        grad = parameter.grad
        assert grad is not None
        if parameter in self._summed:
            raise UserError(
                "a second backward pass after the forward pass with last=True: call backward() before the next forward "
                "pass, or add the losses and call it once"
            )
        self._summed.add(parameter)
        self._holds_sums = True
        self._under_way.append(self._sums_of[parameter].start(local_part(grad)))

    def _wait(self) -> None:
        for future in self._under_way:
            future.wait()
        self._under_way.clear()

    def finish(self) -> None:
        """Wait until all gradients of the step are sums over ranks. UserError if they cannot be."""
        self._wait()
        if self._unsummed and not self._summed:
            raise UserError(
                "the gradients were not summed over ranks: the last forward pass of a step goes through GradientSync, "
                "`loss = sync(...)`, with last=True"
            )
        self._summed.clear()
        self._unsummed = self._last = False
        if self.clock is not None:
            self.clock.switch("other")

    @torch.no_grad()
    def clip(self, max_norm: float) -> Tensor:
        """Scale all gradients to a global norm of at most `max_norm` (0: never); returns the norm before, [].

        The norm is that of the whole model: replicated gradients once, the experts of all ranks of the EP group, and
        every rank's rows of what is sharded.
        """
        if not max_norm >= 0:
            raise UserError(f"clip({max_norm}): give a norm above 0, or 0 to leave gradients as they are")
        if self._summed:
            raise UserError("call finish() before clip(): gradients are not summed over all ranks until then")
        stacked = expert_parameters(self.model)
        replicated: list[Tensor] = []
        experts: list[Tensor] = []
        sharded: list[Tensor] = []
        split: list[DTensor] = []
        split_apart = set(self._split_apart)
        for name, p in self.model.named_parameters():
            if not p.requires_grad:
                continue
            if p.grad is None:
                raise RuntimeError(f"{name} received no gradient")
            if p in split_apart:
                split.append(cast(DTensor, p.grad))
                continue
            (experts if name in stacked else sharded if is_sharded(p) else replicated).append(local_part(p.grad))
        squares = torch.zeros((), device=self.comm.mesh.device)
        if replicated:
            squares = torch.stack(torch._foreach_norm(replicated)).square().sum()
        if experts:
            squares = squares + self.comm.all_reduce_ep(torch.stack(torch._foreach_norm(experts)).square().sum())
        if sharded:
            squares = squares + self.comm.all_reduce(torch.stack(torch._foreach_norm(sharded)).square().sum())
        for grad in split:
            squares = squares + cast(DTensor, torch.linalg.vector_norm(grad)).full_tensor().square()
        norm = squares.sqrt()
        if max_norm > 0:
            every = replicated + experts + sharded + [local_part(grad) for grad in split]
            torch._foreach_mul_(every, (max_norm / (norm + 1e-6)).clamp(max=1.0))
        return norm


def decays(name: str, parameter: Tensor) -> bool:
    """Weight decay acts on matrices: not on norms, biases, or (stacked) expert biases."""
    return parameter.dim() >= 2 and not name.endswith(("b_in", "b_out", "bias"))


def make_optimizer(model: nn.Module, lr: float, weight_decay: float, fused: bool) -> torch.optim.AdamW:
    """AdamW with betas (0.9, 0.95), decay on matrices only, over the parameters that ask for a gradient."""
    groups: dict[tuple[bool, bool], list[nn.Parameter]] = {}
    for name, p in model.named_parameters():
        if p.requires_grad:  # those that are sharded apart: no kernel takes both kinds at once
            groups.setdefault((decays(name, p), is_sharded(p)), []).append(p)
    return torch.optim.AdamW(
        [{"params": ps, "weight_decay": weight_decay if decay else 0.0} for (decay, _), ps in groups.items()],
        lr=lr,
        betas=(0.9, 0.95),
        fused=fused,
    )
