"""Which ranks sit together, and what a byte between two of them costs.

A cluster is modelled as equal nodes of consecutive ranks. Between any two ranks there are only three kinds of
path: none at all (a rank and itself), the node's own links (PCIe, shared memory) and the network between nodes.
Everything the planners decide rests on these three *link classes* and on one integer for each: the cost of a byte
in femtoseconds. Integers, because every rank computes the same plan by itself and two processors may round the
same float differently; femtoseconds, because a byte over NVLink takes about one picosecond and whole picoseconds
would be 10% off.

Specifications are written the way people say them: ``2x4:intra=64gbit,inter=10gbit,latency=20us`` is two nodes of
four ranks. A *bit* rate is written ``8gbit``, ``500mbit`` or ``10Gbps``; a *byte* rate ``2GB/s``. (Traffic-shaping
tools read a lower-case ``gbps`` as bytes; here, as on every network card's box, it means bits.)
"""

import re
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache

import numpy as np

from luffy.errors import UserError

FEMTOSECONDS_PER_SECOND = 10**15

_RATE = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*([kmgtKMGT]?)(i?)(bit|b|B|Bit)(/s|ps|)")
_TIME = re.compile(r"(\d+(?:\.\d*)?|\.\d+)\s*(s|ms|us|ns)")
_SHAPE = re.compile(r"(\d+)(?:x(\d+))?")
_POWER = {"": 0, "k": 1, "m": 2, "g": 3, "t": 4}
_PER_SECOND = {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}


class LinkClass(IntEnum):
    """The kind of path between two ranks, in order of distance."""

    LOCAL = 0
    INTRA_NODE = 1
    INTER_NODE = 2


@dataclass(frozen=True)
class Topology:
    """Equal nodes of consecutive ranks: rank r is on node ``r // ranks_per_node``.

    Rates are bytes per second and direction of one rank's link; ``latency_seconds`` holds one start-up time for
    each link class (local, intra-node, inter-node). Raises ValueError when the numbers make no cluster.
    """

    world_size: int
    ranks_per_node: int
    intra_node_bytes_per_second: float
    inter_node_bytes_per_second: float
    latency_seconds: tuple[float, float, float] = (0.0, 0.0, 0.0)

    def __post_init__(self) -> None:
        if self.world_size < 1 or self.ranks_per_node < 1:
            raise ValueError(f"topology: {self.world_size} ranks in nodes of {self.ranks_per_node}: need at least 1")
        if self.world_size % self.ranks_per_node:
            raise ValueError(f"topology: {self.world_size} ranks do not fill nodes of {self.ranks_per_node}")
        if not (self.intra_node_bytes_per_second > 0 and self.inter_node_bytes_per_second > 0):
            raise ValueError("topology: bytes per second must be positive")
        if len(self.latency_seconds) != 3 or min(self.latency_seconds) < 0:
            raise ValueError("topology: latency_seconds needs one number >= 0 for each of the three link classes")

    @classmethod
    def flat(cls, world_size: int, bytes_per_second: float = 1e9, latency_seconds: float = 0.0) -> "Topology":
        """One node: every pair of ranks is joined by the same link."""
        return cls(world_size, world_size, bytes_per_second, bytes_per_second, (0.0, latency_seconds, latency_seconds))

    @property
    def num_nodes(self) -> int:
        return self.world_size // self.ranks_per_node

    def node_of(self, rank: int) -> int:
        """The node that rank is on."""
        return rank // self.ranks_per_node

    def link_class(self, src: int, dst: int) -> LinkClass:
        """The kind of path from rank src to rank dst (the same as from dst to src)."""
        if src == dst:
            return LinkClass.LOCAL
        same_node = self.node_of(src) == self.node_of(dst)
        return LinkClass.INTRA_NODE if same_node else LinkClass.INTER_NODE

    def link_class_matrix(self) -> np.ndarray:
        """int64 [N, N], not to be written to: ``link_class(src, dst)`` of every pair."""
        return _link_classes(self.world_size, self.ranks_per_node)

    @property
    def class_weights(self) -> tuple[int, int, int]:
        """Femtoseconds a byte spends on each link class; staying on the rank costs nothing."""
        intra, inter = (
            max(1, round(FEMTOSECONDS_PER_SECOND / rate))
            for rate in (self.intra_node_bytes_per_second, self.inter_node_bytes_per_second)
        )
        return 0, intra, inter

    def weight_matrix(self) -> np.ndarray:
        """int64 [N, N]: femtoseconds per byte from rank src to rank dst."""
        return np.array(self.class_weights, dtype=np.int64)[self.link_class_matrix()]

    def weighted_bytes(self, num_bytes: tuple[int, int, int]) -> int:
        """Bytes per link class -> femtoseconds of wire, summed over ranks: what the planners minimise.

        A Python integer, which cannot overflow.
        """
        return sum(count * weight for count, weight in zip(num_bytes, self.class_weights, strict=True))


@lru_cache(maxsize=8)  # a replay asks for each layer
def _link_classes(world_size: int, ranks_per_node: int) -> np.ndarray:
    node = np.arange(world_size) // ranks_per_node
    matrix = np.where(node[:, None] == node[None, :], LinkClass.INTRA_NODE, LinkClass.INTER_NODE).astype(np.int64)
    np.fill_diagonal(matrix, LinkClass.LOCAL)
    matrix.flags.writeable = False
    return matrix


def parse_rate(text: str, option: str = "--link") -> float:
    """``8gbit``, ``500mbit``, ``10Gbps``, ``2GB/s``, ``1.5GiB/s`` -> bytes per second.

    Lower-case b (or "bit") is a bit, upper-case B a byte; k, m, g, t are powers of 1000, and of 1024 with an i.
    Raises UserError naming the option.
    """
    match = _RATE.fullmatch(text.strip())
    if match is None or (match[5] == "" and match[4] in ("b", "B")):
        raise UserError(f"{option} {text}: not a rate; write a number and a unit, such as 8gbit, 500mbit or 2GB/s")
    number, prefix, binary, unit, _ = match.groups()
    if binary and not prefix:
        raise UserError(f"{option} {text}: not a rate; an 'i' needs a prefix, such as 2GiB/s")
    rate = float(number) * (1024 if binary else 1000) ** _POWER[prefix.lower()] / (1 if unit == "B" else 8)
    if rate <= 0:
        raise UserError(f"{option} {text}: a link needs a rate above zero")
    return rate


def parse_seconds(text: str, option: str = "--latency") -> float:
    """``20us``, ``1.5ms``, ``0s`` -> seconds. Raises UserError naming the option."""
    match = _TIME.fullmatch(text.strip())
    if match is None:
        raise UserError(f"{option} {text}: not a time; write a number and a unit, such as 20us or 1ms")
    return float(match[1]) / _PER_SECOND[match[2]]


def parse_topology(text: str, option: str = "--topology") -> Topology:
    """``NODESxRANKS:intra=RATE,inter=RATE,latency=TIME`` -> Topology.

    ``8:intra=64gbit`` is one node of eight ranks. A rate may be left out only where no pair of ranks would use it.
    ``latency`` holds for both kinds of link; ``intra_latency`` and ``inter_latency`` set one alone.
    Raises UserError, in one line that names the option, for anything else.
    """
    shape, _, settings = text.strip().partition(":")
    match = _SHAPE.fullmatch(shape)
    if match is None:
        raise UserError(f"{option} {text}: begin with NODESxRANKS, such as 2x4:intra=64gbit,inter=10gbit")
    nodes, ranks = (int(match[1]), int(match[2])) if match[2] else (1, int(match[1]))
    if nodes < 1 or ranks < 1:
        raise UserError(f"{option} {text}: a cluster needs at least one node of one rank")
    values = _parse_settings(settings, text, option)
    rates = {
        key: parse_rate(values[key], f"{option} {key}") for key in ("intra", "inter") if values.get(key) is not None
    }
    if nodes > 1 and "inter" not in rates:
        raise UserError(f"{option} {text}: {nodes} nodes need inter=RATE, such as inter=10gbit")
    if ranks > 1 and "intra" not in rates:
        raise UserError(f"{option} {text}: {ranks} ranks a node need intra=RATE, such as intra=64gbit")
    # A class that no pair of ranks uses still needs some rate: the other one's, or a neutral one for a single rank.
    intra = rates.get("intra", rates.get("inter", 1e9))
    inter = rates.get("inter", intra)
    latency = values.get("latency", "0s")
    intra_latency, inter_latency = (
        parse_seconds(values.get(key, latency), f"{option} {key}") for key in ("intra_latency", "inter_latency")
    )
    return Topology(nodes * ranks, ranks, intra, inter, (0.0, intra_latency, inter_latency))


def _parse_settings(settings: str, text: str, option: str) -> dict[str, str]:
    known = ("intra", "inter", "latency", "intra_latency", "inter_latency")
    values: dict[str, str] = {}
    for item in filter(None, settings.split(",")):
        key, equals, value = (part.strip() for part in item.partition("="))
        if key not in known or not equals or not value:
            raise UserError(f"{option} {text}: cannot read '{item}'; settings are {', '.join(known)}, each KEY=VALUE")
        if key in values:
            raise UserError(f"{option} {text}: '{key}' is given twice")
        values[key] = value
    return values
