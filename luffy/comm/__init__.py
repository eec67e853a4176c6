"""The only package that talks to the network: mesh, collectives, traffic meter."""

from luffy.comm.collectives import Codec, Comm, RowExchange, all_to_all_rows
from luffy.comm.mesh import Mesh, build_mesh, init_distributed
from luffy.comm.meter import DIRECTIONS, LINK_CLASSES, TrafficMeter

__all__ = [
    "DIRECTIONS",
    "LINK_CLASSES",
    "Codec",
    "Comm",
    "Mesh",
    "RowExchange",
    "TrafficMeter",
    "all_to_all_rows",
    "build_mesh",
    "init_distributed",
]
