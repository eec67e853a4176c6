"""Planning a layer's migration: the same plan on every rank, from the same counts, without a controller.

Each rank gathers the counts anyway (they hold the split sizes); each then runs the same pure planner in integers while
its rows are under way. A digest of the plan is gathered while the experts run and compared before anything is sent by
the plan: ranks that disagree (a bug, memory corruption, unlike library versions) stop with an error instead of hanging
in a collective whose sizes do not match.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from luffy.comm import Comm
from luffy.data.batch import Layout
from luffy.errors import RankMismatchError
from luffy.exchange.migrate import Migration
from luffy.plan.cost import AttentionCost
from luffy.plan.placement import plan_placement
from luffy.plan.problem import Balance, PlacementProblem
from luffy.plan.topology import Topology


@dataclass
class PlanTally:
    """What planning came to since it was last taken: counted by each rank, plans being the same on all.

    seconds: making plans. wait_seconds: comparing them. tokens_max_over_mean: the fullest rank of any plan, in tokens
    over the mean.
    """

    plans: int = 0
    sequences: int = 0
    moved: int = 0
    seconds: float = 0.0
    wait_seconds: float = 0.0
    tokens_max_over_mean: float = 1.0

    def take(self) -> PlanTally:
        out = replace(self)
        self.plans = self.sequences = self.moved = 0
        self.seconds, self.wait_seconds, self.tokens_max_over_mean = 0.0, 0.0, 1.0
        return out


@dataclass(frozen=True)
class Planned:
    """One rank's plan for a layer. migration: None where nobody moves. digests: waits for those of all ranks' plans."""

    migration: Migration | None
    digests: Callable[[], torch.Tensor]


@dataclass
class Planner:
    """Places the sequences of one EP group after each MoE layer.

    strategy: a name of luffy.plan.placement.STRATEGIES. topology: of the EP group. attention: what attention costs,
    which must be the same on every rank. `tally` is shared by all layers.
    """

    comm: Comm
    strategy: str
    topology: Topology
    attention: AttentionCost
    tally: PlanTally = field(default_factory=PlanTally)

    def plan(
        self,
        layer: int,
        layout: Layout,
        counts: np.ndarray,
        residuals_sent: np.ndarray | None,
        next_counts: np.ndarray | None,
        row_num_bytes: int,
        padded: bool,
    ) -> Planned:
        """Where each sequence is rebuilt. Call `confirm` before acting on it.

        counts, next_counts: int64 [S, N]. residuals_sent: int64 [S, N], residuals that travel if a sequence is rebuilt
        there. row_num_bytes: what a row weighs.
        """
        begin = time.perf_counter()
        table = layout.table
        problem = PlacementProblem(
            counts=counts if residuals_sent is None else counts + kept_off_the_wire(residuals_sent, table.home_rank),
            lengths=table.lengths,
            home_rank=table.home_rank,
            topology=self.topology,
            row_num_bytes=row_num_bytes,
            next_counts=next_counts,
            attention=self.attention,
            layout="padded" if padded else "packed",
            balance=Balance.for_lengths(table.lengths),
        )
        options = {"seed": layer} if self.strategy == "random" else {}
        plan = plan_placement(self.strategy, problem, **options)
        digests = self.comm.start_all_gather_ep(torch.tensor([plan.digest()], dtype=torch.int64))
        self.tally.plans += 1
        self.tally.sequences += len(counts)
        self.tally.moved += plan.num_moved
        tokens = np.bincount(plan.new_home, table.lengths, minlength=counts.shape[1])
        fullest = float(tokens.max() / max(tokens.mean(), 1e-9))
        self.tally.tokens_max_over_mean = max(self.tally.tokens_max_over_mean, fullest)
        self.tally.seconds += time.perf_counter() - begin
        if plan.num_moved == 0:
            return Planned(None, digests)
        new = Layout(table.moved(plan.new_home), self.comm.mesh.ep_rank, layout.device)
        return Planned(Migration(layout, new, counts, residuals_sent), digests)

    def confirm(self, planned: Planned, layer: int) -> None:
        """Wait until all ranks have planned; RankMismatchError names the layer and the ranks that planned differently.

        The wait is tallied by itself: it is for the slowest rank, for which the combine would have waited instead.
        """
        begin = time.perf_counter()
        digests = planned.digests().flatten().tolist()
        self.tally.wait_seconds += time.perf_counter() - begin
        if len(set(digests)) > 1:
            common = max(set(digests), key=lambda d: (digests.count(d), -digests.index(d)))
            odd = [r for r, d in enumerate(digests) if d != common]
            raise RankMismatchError(
                f"MoE layer {layer}: ranks {odd} planned another placement than the other {len(digests) - len(odd)} "
                "ranks; the plan was not executed"
            )


def kept_off_the_wire(residuals_sent: np.ndarray, home_rank: np.ndarray) -> np.ndarray:
    """Residuals as rows of a PlacementProblem: those that do not travel if a sequence is at a rank, int64 [S, N].

    With one class of links the costs of any two ranks then differ by what their residuals cost; with two, a row that
    would be spared at either of two ranks is priced as if it came from both.
    """
    S = np.arange(len(home_rank))
    kept = residuals_sent.max(1, keepdims=True, initial=0) - residuals_sent
    kept[S, home_rank] = residuals_sent.max(1, initial=0)
    return kept
