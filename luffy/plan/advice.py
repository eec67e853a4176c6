"""What a prediction comes to: which recipe to take, what it gains, and when another way to train sends less.

Three ways that are not ours are weighed by the same measure, the seconds for which the busiest link is busy in a step.
P nodes of n ranks, N = P n; T tokens a step, rows of R bytes; W bytes of weights of all experts of all layers:

* Pipeline parallelism between nodes, with experts spread inside each: a node holds a part of the layers, so rows stay
  in it, and each token's state goes to the next node once a boundary, and its gradient back: 2 (P - 1) R bytes a token
  between nodes, T R / n through a rank's link each way. A node then idles for (P - 1) / m of the computation with m
  micro-batches in flight (GPipe, arXiv 1811.06965). It wins where links between nodes are slow beside those inside.
* Data parallelism with sharded weights (ZeRO-3, arXiv 1910.02054): no row travels; weights of experts are gathered in
  forward and in backward, and gradients are scattered: 3 W, inside nodes and, once a node, between them.
* Data parallelism with offloading (ZeRO-Offload, arXiv 2101.06840): gradients of experts are summed over ranks, 2 W,
  inside nodes first; weights, which are kept in the host's memory, come in twice and gradients go out once, 3 W.

The last two send as much for few tokens as for many, so they win from some number of tokens a step (`enough_tokens`).
Whether a way fits in memory is not asked. Latency and the replicated weights' gradients are left out, as for recipes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from luffy.plan.prediction import Prediction
from luffy.plan.topology import Topology
from luffy.report.units import format_seconds

LEVEL = 0.03  # less gain than this is none: predictions are off by more
MICRO_BATCHES = 8  # in flight for each pipeline stage
HOST_BYTES_PER_SECOND = 25e9  # PCIe 4.0 x16, one direction


@dataclass(frozen=True)
class Alternative:
    """A way to train without the recipes. seconds: of busy links; idle_share: of the computation, spent waiting.

    num_bytes: (in nodes, between nodes), all ranks together, of one step. fixed: whatever the number of tokens.
    """

    name: str
    seconds: float
    idle_share: float = 0.0
    num_bytes: tuple[float, float] = (0.0, 0.0)
    fixed: bool = False

    def step_seconds(self, compute_seconds: float) -> float:
        return compute_seconds * (1 + self.idle_share) + self.seconds

    def enough_tokens(self, other_seconds: float, num_tokens: float) -> float | None:
        """Tokens a step from which it beats what keeps links busy for `other_seconds` with `num_tokens`, and grows with
        them; None where the number of tokens decides nothing."""
        return num_tokens * self.seconds / other_seconds if self.fixed and other_seconds > 0 else None


def pipeline(inside: Prediction, topology: Topology, num_tokens: float, row_num_bytes: int) -> Alternative:
    """Nodes as pipeline stages. inside: `vanilla_dedup` for the same tokens on the ranks of one node.

    num_tokens: of a step of the group. A node meets all tokens with a part of the layers, so a rank's rows are those of
    all layers for its own share of the tokens: of what `inside` counts, the share of the node in the group.
    """
    P, n = topology.num_nodes, topology.ranks_per_node
    rows = inside.exchange_seconds * n / topology.world_size
    states = 2 * num_tokens * row_num_bytes / n / topology.inter_node_bytes_per_second  # forward and backward
    crossing = (inside.num_bytes[0], 2 * (P - 1) * num_tokens * row_num_bytes)
    return Alternative(f"pipeline between {P} nodes, experts inside each", rows + states,
                       (P - 1) / (MICRO_BATCHES * P), crossing)  # fmt: skip


def _weights_through_links(topology: Topology, num_bytes: float) -> tuple[float, tuple[float, float]]:
    """Seconds, and bytes (in nodes, between), of weights that are gathered or scattered once among all ranks."""
    P, n = topology.num_nodes, topology.ranks_per_node
    inside, between = (n - 1) / n * num_bytes, (P - 1) / P * num_bytes / n  # of a rank
    seconds = inside / topology.intra_node_bytes_per_second + between / topology.inter_node_bytes_per_second
    return seconds, (topology.world_size * inside, topology.world_size * between)


def sharded(topology: Topology, expert_weights_num_bytes: float) -> Alternative:
    """ZeRO-3: every rank computes all experts for its own tokens. expert_weights_num_bytes: of all, in all layers."""
    seconds, crossing = _weights_through_links(topology, 3 * expert_weights_num_bytes)
    return Alternative("data parallelism, weights sharded (ZeRO-3)", seconds, 0.0, crossing, fixed=True)


def offloading(topology: Topology, expert_weights_num_bytes: float) -> Alternative:
    """ZeRO-Offload: as `sharded`, with weights in the host's memory."""
    sums, crossing = _weights_through_links(topology, 2 * expert_weights_num_bytes)
    return Alternative("data parallelism, weights in host memory", sums + 3 * expert_weights_num_bytes
                       / HOST_BYTES_PER_SECOND, 0.0, crossing, fixed=True)  # fmt: skip


def slowest_of_groups(seconds: Sequence[float], num_groups: int) -> float:
    """Mean seconds until the slowest of `num_groups` groups is through, where each has one of the recorded steps by
    chance: with x_1 <= .. <= x_n, the sum of x_i ((i / n)^G - ((i - 1) / n)^G).

    It equals the mean over all n^G ways to deal n steps to G groups, which 10,000 ranks would not let one run through.
    """
    n, ordered = len(seconds), sorted(seconds)
    return sum(x * (((i + 1) / n) ** num_groups - (i / n) ** num_groups) for i, x in enumerate(ordered))


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
        line += f". Not ours, and less to send: {a.name} (links busy for {format_seconds(a.seconds)}"
        line += f", not {format_seconds(best.exchange_seconds)}"
        line += f"; {a.idle_share:.0%} of the computation idle)" if a.idle_share else ")"
    return Advice(line, best.recipe, gain(best))
