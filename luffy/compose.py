"""From a recipe to objects: the only place that reads what a Recipe says.

    runtime = Runtime.create(comm, recipe, config)     what the layers of one model share
    dispatcher = runtime.dispatcher(layer, ...)        Direct, inside Condensing, Hosting or Rebuilding

A new recipe is an entry in luffy.recipes; a new axis is a field there, an object, and a line here.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.comm.clock import PhaseClock
from luffy.condensation import parse_condense
from luffy.config import ModelConfig
from luffy.data.batch import Layout
from luffy.errors import UserError
from luffy.exchange.alone import Alone
from luffy.exchange.condense import CondenseState
from luffy.exchange.condensing import Condensing
from luffy.exchange.direct import Direct
from luffy.exchange.dispatcher import Dispatcher
from luffy.exchange.hosting import Hosting
from luffy.exchange.planning import Planner
from luffy.exchange.rebuilding import Rebuilding
from luffy.exchange.recorder import Recorder
from luffy.exchange.residency import Experts, LayerResidency, ResidencyState
from luffy.exchange.tally import RowTally
from luffy.exchange.wire import Draws, Transport
from luffy.plan.cost import AttentionCost
from luffy.plan.topology import Topology
from luffy.recipes import RESIDENCIES, SEATS, Recipe
from luffy.wire_format import WireSpec


@dataclass
class Runtime:
    """What every layer of one model shares: the network, the clock, the recipe, what to recompute.

    topology: of the EP group, for everything that plans. planner: None for recipes that move no sequence behind layers.
    condense: None for recipes that condense no tokens. residency: None for recipes that leave experts where they are.
    draws: where stochastic rounding is in the run. tally: rows between ranks. observed: while a list, layers add
    the rows of each local sequence to each rank, int64 [S, N], beside how sequences lie, for the predictor of seats.
    """

    comm: Comm
    clock: PhaseClock
    recipe: Recipe
    topology: Topology
    draws: Draws
    recompute: bool = False
    planner: Planner | None = None
    condense: CondenseState | None = None
    residency: ResidencyState | None = None
    recorder: Recorder = field(default_factory=Recorder)
    tally: RowTally = field(default_factory=RowTally)
    observed: list[tuple[Layout, Tensor]] | None = None
    transports: list[Transport] = field(default_factory=list)
    last_layer: int = -1  # the MoE layer that a block of one's own computed last

    @classmethod
    def create(
        cls,
        comm: Comm,
        recipe: Recipe,
        config: ModelConfig,
        recompute: bool = False,
        topology: Topology | None = None,
        attention: AttentionCost | None = None,
    ) -> Runtime:
        """The runtime of `recipe` for a model of `config`; raises UserError where the two cannot go together.

        topology: links of the EP group. None: links within a node are taken as ten times as fast as those between.
        attention: its cost, for planning. None: by the paper's formula, at a rate that no plan depends on.
        """
        _check(recipe, config)
        mesh = comm.mesh
        if topology is None:
            nodes = [mesh.node_of_rank[r] for r in mesh.ep_ranks]
            topology = Topology(mesh.ep_size, nodes.count(nodes[0]), 1e10, 1e9)
        runtime = cls(comm, PhaseClock(mesh.device), recipe, topology, Draws(mesh.rank), recompute)
        runtime._share(attention or AttentionCost(config.hidden_size), hosts=mesh.ep_size > 1)
        return runtime

    def _share(self, attention: AttentionCost, *, hosts: bool) -> None:
        """Set what the recipe has layers share. hosts: whether there are other ranks' experts to hold."""
        recipe = self.recipe
        if recipe.moves:
            self.planner = Planner(self.comm, recipe.placement, self.topology, attention)
        if (scheme := parse_condense(recipe.condense)) is not None:
            self.condense = CondenseState(scheme)
        if recipe.residency != "static" and hosts:
            self.residency = ResidencyState(self.topology)

    @property
    def looks_ahead(self) -> bool:
        """Whether layers are asked what they would choose before their rows are theirs."""
        return self.recipe.look_ahead

    def dispatcher(
        self, layer: int, layer_of_moe: int, experts: Experts, *, causal: bool, may_drop: bool
    ) -> Dispatcher:
        """For layer `layer`, the `layer_of_moe`-th MoE layer of its model. may_drop: its router has a capacity."""
        if self.condense is not None:
            known = self.condense.thresholds
            known += [self.condense.scheme.level] * (layer_of_moe + 1 - len(known))
        spec = WireSpec() if self.recipe.auto else self.recipe.wire_spec  # of auto a permission
        transport = Transport(self._rounding_alike(spec), self.draws, layer)
        self.transports.append(transport)
        rounds_all = self.recipe.wire_spec.local and transport.codes  # asked for even where nothing travels
        alone = self.comm is not None and self.comm.mesh.ep_size == 1 and not rounds_all
        if alone and self.planner is None and self.condense is None:
            return Alone(self.clock, layer, self.tally)
        direct = Direct(self.comm, self.clock, self.recipe.copies, transport, self.tally)
        return _wrapped(direct, self, layer, layer_of_moe, experts, causal=causal, may_drop=may_drop)

    def use_wire(self, spec: WireSpec) -> None:
        """From the next forward pass on, rows of all layers travel in these formats."""
        for transport in self.transports:
            transport.spec = self._rounding_alike(spec)

    def _rounding_alike(self, spec: WireSpec) -> WireSpec:
        """Where seats follow from whole sequences, rows that stay are rounded as well: who stays must not tell a token
        of its future."""
        return spec if self.recipe.seats == "as-read" else replace(spec, local=True)

    def begin(self) -> None:
        """Before a forward pass of the whole model."""
        if self.residency is not None:
            self.residency.reset()


def _wrapped(
    direct: Direct, runtime: Runtime, layer: int, layer_of_moe: int, experts: Experts, *, causal: bool, may_drop: bool
) -> Dispatcher:
    recipe = runtime.recipe
    dispatcher: Dispatcher = direct
    if runtime.condense is not None:
        dispatcher = Condensing(dispatcher, runtime.condense, layer_of_moe, causal=causal, by_sequence=recipe.moves)
    if runtime.residency is not None:
        residency = LayerResidency(runtime.residency, runtime.comm, experts, recipe.residency)
        dispatcher = Hosting(dispatcher, residency, runtime.clock)
    if runtime.planner is not None:
        dispatcher = Rebuilding(dispatcher, runtime.planner, layer, may_drop=may_drop, looks_ahead=recipe.look_ahead)
    return dispatcher


def _check(recipe: Recipe, config: ModelConfig) -> None:
    """Names that do not exist, and what no dispatcher can know of."""
    for option, value, known in (("seats", recipe.seats, SEATS), ("residency", recipe.residency, RESIDENCIES)):
        if value not in known:
            raise UserError(f"--{option} {value}: choose one of {', '.join(known)}")
    if recipe.moves and recipe.seats != "as-read":
        raise UserError(
            f"--seats {recipe.seats} cannot be combined with --recipe {recipe.name}, which moves sequences behind "
            "layers; use --recipe luffy"
        )
    if config.latent_size and (recipe.moves or recipe.condense != "none"):
        raise UserError(
            f"--latent-size {config.latent_size} cannot be combined with --recipe {recipe.name}, whose rows carry the "
            "stream: choose a recipe that neither moves sequences behind layers nor condenses tokens"
        )
    if config.memory_length and (recipe.moves or recipe.seats != "as-read"):
        raise UserError(
            f"--memory-length cannot be combined with --recipe {recipe.name}: the states of a segment stay on the rank "
            "that read it, and moving them would cost more than it saves; use --recipe vanilla_dedup"
        )


def check(recipe: Recipe, config: ModelConfig) -> None:
    """Raise UserError where a recipe cannot train a model of `config`, before anything is launched."""
    _check(recipe, config)
    nobody: Comm = None  # type: ignore[assignment]  # dispatchers ask nothing of it when they are made
    topology = Topology(1, 1, 1.0, 1.0)
    runtime = Runtime(nobody, PhaseClock(torch.device("cpu")), recipe, topology, Draws(0))
    runtime._share(AttentionCost(config.hidden_size), hosts=True)
    no_experts: Experts = None  # type: ignore[assignment]
    runtime.dispatcher(0, 0, no_experts, causal=config.causal, may_drop=False)
