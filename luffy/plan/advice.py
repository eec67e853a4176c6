"""What a prediction comes to: which recipe to take, what it gains, and when another way to train sends less.

Two ways that are not ours are weighed by the same measure, the seconds for which the busiest link is busy in a step:

* Pipeline parallelism between nodes, with experts spread inside each: a node holds a part of the layers, so rows of
  tokens stay in it, and each token's state goes to the next node once a boundary, and its gradient back. A node then
  idles for (P - 1) / m of the computation of P nodes with m micro-batches in flight (GPipe, arXiv 1811.06965).
* Data parallelism with offloading: no row travels; the gradients of all experts are summed over ranks, inside nodes
  first, and weights, which are kept in the host's memory, come in twice and gradients go out once a step (ZeRO-Offload,
  arXiv 2101.06840).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luffy.plan.prediction import Prediction
from luffy.plan.topology import Topology

LEVEL = 0.03  # less gain than this is none: predictions are off by more
MICRO_BATCHES = 8  # in flight for each pipeline stage
HOST_BYTES_PER_SECOND = 25e9  # PCIe 4.0 x16, one direction


@dataclass(frozen=True)
class Alternative:
    """A way to train without the recipes. seconds: of busy links; idle_share: of the computation, spent waiting."""

    name: str
    seconds: float
    idle_share: float = 0.0

    def step_seconds(self, compute_seconds: float) -> float:
        return compute_seconds * (1 + self.idle_share) + self.seconds


def pipeline(inside: Prediction, topology: Topology, num_tokens: float, row_num_bytes: int) -> Alternative:
    """Nodes as pipeline stages. inside: `vanilla_dedup` for the same tokens on the ranks of one node.

    num_tokens: of a step of the group. A node meets all tokens with a part of the layers, so a rank's rows are those of
    all layers for its own share of the tokens: of what `inside` counts, the share of the node in the group.
    """
    P, n = topology.num_nodes, topology.ranks_per_node
    rows = inside.exchange_seconds * n / topology.world_size
    states = 2 * num_tokens * row_num_bytes / n / topology.inter_node_bytes_per_second  # forward and backward
    return Alternative(f"pipeline parallelism between {P} nodes, experts inside each", rows + states,
                       (P - 1) / (MICRO_BATCHES * P))  # fmt: skip


def offloading(topology: Topology, expert_weights_num_bytes: float) -> Alternative:
    """Every rank computes all experts for its own tokens. expert_weights_num_bytes: of all experts of all layers."""
    P, n = topology.num_nodes, topology.ranks_per_node
    sums = 2 * (n - 1) / n * expert_weights_num_bytes / topology.intra_node_bytes_per_second
    sums += 2 * (P - 1) / P * expert_weights_num_bytes / n / topology.inter_node_bytes_per_second
    return Alternative("data parallelism with weights offloaded to the host", sums + 3 * expert_weights_num_bytes
                       / HOST_BYTES_PER_SECOND)  # fmt: skip


def group_sum_seconds(topology: Topology, num_groups: int, expert_weights_num_bytes: float) -> float:
    """Seconds in which groups of ranks sum the gradients of the experts of a rank: the same for every lossless recipe.

    topology: of one group. The links between groups are those between nodes, unless several groups share a node.
    """
    own = expert_weights_num_bytes / topology.world_size
    return 2 * (num_groups - 1) / num_groups * own / topology.inter_node_bytes_per_second


@dataclass(frozen=True)
class Advice:
    """line: for a person. recipe: to take. gain: over the base recipe, in steps or, unknown, in busy links."""

    line: str
    recipe: str
    gain: float


def advise(
    predictions: Sequence[Prediction],
    lossless: Sequence[str],
    alternatives: Sequence[Alternative] = (),
    compute_seconds: float | None = None,
) -> Advice:
    """The advice of predictions, of which `lossless` may be taken without a second thought.

    The base is `vanilla_dedup`, or the first prediction where it is missing. A recipe that gains less than LEVEL over
    the base is not worth taking, and one that is not lossless is named beside the others.
    """
    named = {p.recipe: p for p in predictions}
    base = named.get("vanilla_dedup", predictions[0])
    known = compute_seconds or 0.0

    def gain(p: Prediction) -> float:
        seconds = known + p.exchange_seconds
        return (known + base.exchange_seconds) / seconds if seconds else 1.0

    def words(p: Prediction) -> str:
        if compute_seconds is None:
            return f"links are busy for {1 / gain(p):.2f} of the time of {base.recipe}"
        return f"{gain(p):.2f}x the speed of {base.recipe}"

    exact = [p for p in predictions if p.recipe in lossless]
    best = max(exact, key=gain, default=base)
    if gain(best) < 1 + LEVEL:
        best = base
    lossy = max((p for p in predictions if p.recipe not in lossless), key=gain, default=base)
    if best is base:
        line = f"take {base.recipe}: no lossless recipe gains more than {LEVEL:.0%} here"
    else:
        line = f"take {best.recipe}: {words(best)}"
    if gain(lossy) > gain(best) * (1 + LEVEL):
        line += f"; if rows may be rounded, {lossy.recipe}: {words(lossy)}"
    won = [a for a in alternatives if a.step_seconds(known) < (known + best.exchange_seconds) / (1 + LEVEL)]
    for a in sorted(won, key=lambda a: a.step_seconds(known)):
        line += f". Not ours, and less to send: {a.name} ({a.seconds:.3g} s of busy links"
        line += f" for {best.exchange_seconds:.3g}"
        line += f", {a.idle_share:.0%} of the computation idle)" if a.idle_share else ")"
    return Advice(line, best.recipe, gain(best))
