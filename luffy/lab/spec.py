"""What the emulated cluster looks like.

Ranks are numbered through the nodes in order. Two ranks of one node talk over the node's own links, two ranks of
different nodes over network cards:

    rank --link-- [switch of the node] --link-- rank
    rank ----- [card] --inter-link-- [network] --inter-link-- [card] ----- rank of another node

* A rank's link to its node's switch runs at `--link` in each direction, both at once (as PCIe does).
* A card runs at `--inter-link` in each direction, both at once. `--nic node` gives a node **one** card, which its ranks
  share: the usual server on Ethernet. `--nic rank` gives every rank a card of its own: servers built for training.

Traffic between nodes passes the cards and not the node's links, so every byte meets one class of link, the one by which
the traffic meter counts it. `topology` is the same cluster in the words of the cost model, which prices a rank's share.
"""

from __future__ import annotations

from dataclasses import dataclass

from luffy.errors import UserError
from luffy.plan.topology import parse_rate, parse_seconds

NICS = ("node", "rank")
MAX_NODES = 250
MAX_RANKS_PER_NODE = 250
# The kernel's token bucket counts bytes per second in 32 bits.
MAX_BYTES_PER_SECOND = 2**32 - 1
MIN_BYTES_PER_SECOND = 1e6 / 8


def _rate(text: str, option: str) -> float:
    rate = parse_rate(text, option)
    if rate > MAX_BYTES_PER_SECOND:
        raise UserError(f"{option} {text}: a link can be held to 34gbit at most; leave the option out for no limit")
    if rate < MIN_BYTES_PER_SECOND:
        raise UserError(f"{option} {text}: too slow to train over; use 1mbit or more")
    return rate


@dataclass(frozen=True)
class LabSpec:
    """Ranks, nodes and rates, in bytes per second and direction; a rate of None is a link without a limit.

    `inter_link` is the rate of one network card, which belongs to a node or to a rank as `nic` says.
    """

    ranks: int
    nodes: int = 1
    link: float | None = None
    inter_link: float | None = None
    nic: str = "node"
    latency_seconds: float = 0.0

    @property
    def ranks_per_node(self) -> int:
        return self.ranks // self.nodes

    def node_of(self, rank: int) -> int:
        return rank // self.ranks_per_node

    def address(self, rank: int) -> str:
        """The rank's one address, whichever way a peer takes to it."""
        return f"10.77.{self.node_of(rank)}.{rank % self.ranks_per_node + 1}"

    @property
    def topology(self) -> str | None:
        """This cluster for `luffy plan --topology`; None if a link of it has no limit."""
        rates = []
        if self.ranks_per_node > 1:
            if self.link is None:
                return None
            rates.append(f"intra={_bits(self.link)}")
        if self.nodes > 1:
            if self.inter_link is None:
                return None
            rates.append(f"inter={_bits(self.inter_link / (self.ranks_per_node if self.nic == 'node' else 1))}")
        if self.latency_seconds:
            rates.append(f"latency={self.latency_seconds * 1e6:g}us")
        return f"{self.nodes}x{self.ranks_per_node}:{','.join(rates)}"


def _bits(bytes_per_second: float) -> str:
    bits = bytes_per_second * 8
    return f"{bits / 1e9:.10g}gbit" if bits >= 1e9 else f"{bits / 1e6:.10g}mbit"


def read_spec(
    ranks: int,
    link: str | None = None,
    nodes: int = 1,
    inter_link: str | None = None,
    nic: str = "node",
    latency: str | None = None,
) -> LabSpec:
    """The cluster that the options of `luffy lab` describe. Raises UserError, naming option and mend, for any other."""
    if ranks < 1:
        raise UserError(f"--ranks {ranks} must be at least 1")
    if nodes < 1 or ranks % nodes:
        fitting = ", ".join(str(k) for k in range(1, ranks + 1) if ranks % k == 0)
        raise UserError(f"--nodes {nodes}: {ranks} ranks do not fill {nodes} equal nodes; choose one of {fitting}")
    if nodes > MAX_NODES or ranks // nodes > MAX_RANKS_PER_NODE:
        raise UserError(f"--ranks {ranks} --nodes {nodes}: at most {MAX_NODES} nodes of {MAX_RANKS_PER_NODE} ranks")
    if nodes == 1 and inter_link is not None:
        raise UserError(f"--inter-link {inter_link}: one node has no link to another; add --nodes 2 or more")
    if nodes > 1 and inter_link is None and link is not None:
        raise UserError(f"--nodes {nodes} needs --inter-link RATE, the rate between nodes, such as 4gbit")
    if nic not in NICS:
        raise UserError(f"--nic {nic}: must be one of {', '.join(NICS)}")
    return LabSpec(
        ranks=ranks,
        nodes=nodes,
        link=None if link is None else _rate(link, "--link"),
        inter_link=None if inter_link is None else _rate(inter_link, "--inter-link"),
        nic=nic,
        latency_seconds=0.0 if latency is None else parse_seconds(latency, "--latency"),
    )
