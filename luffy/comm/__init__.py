"""The only package that talks to the network: mesh, collectives, traffic meter."""

from luffy.comm.collectives import Comm
from luffy.comm.mesh import Mesh, build_mesh, init_distributed
from luffy.comm.meter import DIRECTIONS, LINK_CLASSES, TrafficMeter
from luffy.comm.rows import Codec, RowExchange, RowsUnderWay, all_to_all_rows, arrive, depart

__all__ = [
    "DIRECTIONS",
    "LINK_CLASSES",
    "Codec",
    "Comm",
    "Mesh",
    "RowExchange",
    "RowsUnderWay",
    "TrafficMeter",
    "all_to_all_rows",
    "arrive",
    "build_mesh",
    "depart",
    "init_distributed",
]
