"""The exchange behind torchtitan's token dispatcher: one row a (token, rank), partial sums back.

torchtitan's own dispatcher sends a row for each (token, expert) pair and weighs the answers at home. Here a token's row
goes once to each rank that holds any of its experts, with the ids and weights of its choices; the rows of a rank's
experts are gathered there, their answers weighed and added up there, and one sum comes back (luffy.exchange.direct).
Routers, experts, sharding and checkpoints of the model stay torchtitan's.

Under selective activation checkpointing no row is sent again in the backward pass (luffy.comm.lent). Under full
checkpointing rows travel again, as torchtitan's do, and are counted.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import spmd_types as spmd
import torch
from torch import Tensor
from torchtitan.models.common.token_dispatcher import AllToAllTokenDispatcher

from luffy.comm.clock import PhaseClock
from luffy.comm.lent import LentComm, mesh_of_group
from luffy.comm.meter import TrafficMeter
from luffy.compose import Runtime
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.errors import UserError
from luffy.exchange.copies import ExpertMap
from luffy.exchange.dispatcher import Dispatcher, Received, Tokens
from luffy.exchange.permute import pairs_by_expert
from luffy.exchange.stage import finish
from luffy.exchange.tally import RowTally
from luffy.exchange.wire import Draws
from luffy.kernels.rows import gather_rows, sum_rows
from luffy.kernels.sort import Pairs
from luffy.model.observe import observe
from luffy.plan.topology import Topology
from luffy.recipes import RECIPES
from luffy.wire_format import parse_wire

_NO_COMPILE = (
    "luffy.titan.exchange cannot be compiled, since it reads split sizes on the host: leave `model` out of "
    "--compile.components (loss may stay)"
)


@dataclass(frozen=True)
class Dispatched:
    """What `combine` must know of its `dispatch`."""

    tokens: Tokens
    received: Received
    pairs: Pairs


class LuffyTokenDispatcher(AllToAllTokenDispatcher):
    """torchtitan's seam: `dispatch` and `combine` of a MoE layer. With one expert-parallel rank torchtitan's own."""

    @dataclass(kw_only=True, slots=True)
    class Config(AllToAllTokenDispatcher.Config):
        """wire: in which format rows cross links, as `luffy train --wire` takes it."""

        wire: str = "model"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        parse_wire(config.wire)
        self.wire = config.wire
        self.runtime: SharedRuntime | None = None

    def wire_meshes(self, *, ep_mesh: Any) -> None:
        """Called by torchtitan once the groups are there."""
        super().wire_meshes(ep_mesh=ep_mesh)
        if ep_mesh is None:
            return
        self.runtime = shared_runtime(ep_mesh, self.wire)
        layer = len(self.runtime.transports)
        nobody: Any = None  # experts stay where they are
        self.exchange: Dispatcher = self.runtime.dispatcher(layer, layer, nobody, causal=True, may_drop=False)
        slots = torch.arange(self.num_experts, device=self.runtime.comm.mesh.device)
        self.experts = ExpertMap(slots, self.num_experts // ep_mesh.size())
        _WIRED.add(self)

    def dispatch(
        self, x_TD: Tensor, topk_scores_TK: Tensor, topk_expert_ids_TK: Tensor, num_local_tokens_per_expert_E: Tensor
    ) -> tuple[Tensor, Tensor, Any]:  # fmt: skip
        """Rows [R, D] in the order of this rank's experts, how many each has [e], and what `combine` must know."""
        if self.runtime is None:
            return super().dispatch(x_TD, topk_scores_TK, topk_expert_ids_TK, num_local_tokens_per_expert_E)
        if torch.compiler.is_compiling():
            raise UserError(_NO_COMPILE)
        if spmd.is_type_checking():
            raise UserError("luffy.titan.exchange has no SPMD types: leave --debug.spmd_typechecking off")
        mesh = self.runtime.comm.mesh
        batch = TokenBatch(x_TD, self.runtime.layout(x_TD))
        tokens = Tokens(
            batch, x_TD, topk_expert_ids_TK, topk_scores_TK, self.experts, _as_it_is, _nothing_else, residual=False
        )  # fmt: skip
        if self.runtime.observing:
            tokens = observe(tokens, None, self.runtime)
        received = finish(self.exchange.dispatch(tokens))
        pairs = pairs_by_expert(received.expert_ids, self.experts, mesh.ep_rank, received.num_pairs)
        rows = gather_rows(received.rows, pairs.row, pairs.place)
        per_expert = torch.diff(pairs.ends, prepend=pairs.ends.new_zeros(1)).to(num_local_tokens_per_expert_E.dtype)
        return rows, per_expert, Dispatched(tokens, received, pairs)

    def combine(self, routed_output_RD: Tensor, metadata: Any, x_TD: Tensor) -> Tensor:
        """Answers [R, D] of this rank's experts -> [T, D] of this rank's tokens."""
        if self.runtime is None:
            return super().combine(routed_output_RD, metadata, x_TD)
        received, pairs, dtype = metadata.received, metadata.pairs, routed_output_RD.dtype
        weights = received.weights.flatten().index_select(0, pairs.flat)  # [R]
        wide = torch.promote_types(dtype, torch.float32)
        partial = sum_rows(routed_output_RD.to(wide) * weights[:, None].to(wide), pairs.row, pairs.place).to(dtype)
        return finish(self.exchange.combine(metadata.tokens, received, partial)).hidden


def _as_it_is(rows: Tensor) -> Tensor:
    return rows


def _nothing_else(rows: Tensor, normed: Tensor | None = None) -> Tensor:
    return rows


def _first_time() -> bool:
    """Whether this is the forward pass, not one that is computed again for the backward pass."""
    return torch._C._current_graph_task_id() == -1


class FirstTally(RowTally):
    """Counts what is computed again once."""

    def note(self, layer: int, rows: np.ndarray) -> None:
        if _first_time():
            super().note(layer, rows)


@dataclass
class SharedRuntime(Runtime):
    """What the layers of one model share. num_sequences: in a batch of the seated loader."""

    num_sequences: int = 1
    tally: RowTally = field(default_factory=FirstTally)

    @property
    def observing(self) -> bool:
        """Whether this pass is one that a seated loader learns from: of training, and not computed again."""
        return self.observed is not None and torch.is_grad_enabled() and _first_time()

    def layout(self, x: Tensor) -> Layout:
        """Sequences of equal length in x [T, D], where they are observed; else all tokens are as one."""
        mesh, B = self.comm.mesh, self.num_sequences if self.observing else 1
        return Layout(SequenceTable(np.full(B, len(x) // B), np.full(B, mesh.ep_rank)), mesh.ep_rank, x.device)


_WIRED: weakref.WeakSet[LuffyTokenDispatcher] = weakref.WeakSet()  # of this process, for the loader to find


def runtimes(modules: Iterable[Any] | None = None) -> list[SharedRuntime]:
    """Those of these modules, or of all models of this process."""
    wired = _WIRED if modules is None else [getattr(m, "token_dispatcher", None) for m in modules]
    found = [d.runtime for d in wired if isinstance(d, LuffyTokenDispatcher) and d.runtime is not None]
    return list({id(r): r for r in found}.values())


def shared_runtime(ep_mesh: Any, wire: str) -> SharedRuntime:
    """One for all layers over a group: they share a traffic meter."""
    recipe = replace(RECIPES["luffy"], wire=wire)
    mesh = mesh_of_group(ep_mesh)
    for runtime in runtimes():
        if runtime.comm.mesh.ep_group is mesh.ep_group and runtime.recipe == recipe:
            return runtime
    comm = LentComm(mesh, TrafficMeter(mesh.rank, mesh.node_of_rank))
    return SharedRuntime(comm, PhaseClock(mesh.device), recipe, Topology.flat(mesh.ep_size), Draws(mesh.rank))
