"""What this machine and its links do in a second: measured at the start of a run where a plan depends on it.

All ranks measure at the same time, as they will work at the same time, and agree on the slowest.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from statistics import median

import torch

from luffy.comm import Comm, RowExchange, all_to_all_rows
from luffy.kernels.sort import sort_by_group
from luffy.model.experts import Experts
from luffy.plan.topology import Topology

LEAST_SECONDS = 5e-3  # a transfer shorter than this says little of a link's rate


def half_of_memory(device: torch.device, local_ranks: int) -> int:
    """Bytes: half of the GPU, or of this rank's share of the host."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).total_memory // 2
    with open("/proc/meminfo") as f:
        kilobytes = next(int(line.split()[1]) for line in f if line.startswith("MemTotal"))
    return kilobytes * 1024 // (2 * local_ranks)


def _timed(action: Callable[[], object], comm: Comm, repeats: int) -> float:
    """Median seconds of the slowest rank, of an action that all ranks begin together."""
    device, times = comm.mesh.device, []
    for _ in range(repeats + 1):
        comm.all_reduce(torch.zeros(1, device=device))
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        begin = time.perf_counter()
        action()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - begin)
    mine = torch.tensor([median(times[1:])], dtype=torch.float64, device=device)
    return float(comm.all_gather_world(mine).max())


def measure_experts(experts: Experts, num_rows: int, dtype: torch.dtype, comm: Comm, repeats: int = 3) -> float:
    """Operations per second of the slowest rank's experts, forward and backward, all ranks busy.

    num_rows: about what a rank computes in a step, spread evenly over its experts.
    """
    each = max(1, num_rows // experts.num_local)
    ids = torch.arange(experts.num_local, device=comm.mesh.device).repeat_interleave(each)[:, None]
    pairs = sort_by_group(ids, experts.num_local)
    x = torch.randn(len(ids), experts.hidden_size, dtype=dtype, device=comm.mesh.device)
    ones = torch.ones(len(ids), 1, dtype=torch.promote_types(dtype, torch.float32), device=comm.mesh.device)
    x.requires_grad_()
    weights = [p for p in experts.parameters() if p.requires_grad]
    # Not the gradient of a sum, which is one number seen through strides of zero: grouped products refuse that.
    upstream = torch.randn_like(x)

    def work() -> None:
        with torch.enable_grad():
            torch.autograd.grad(experts(x, ones, pairs), [x, *weights], upstream)

    seconds = _timed(work, comm, repeats)
    size = sum(p[0].numel() for p in experts.parameters())
    return 6.0 * size * x.shape[0] / seconds


@dataclass(frozen=True)
class _Link:
    """Rows of 4096 bytes to EP rank `to`, and as many from `source`."""

    comm: Comm
    to: int
    source: int

    def send(self, num_bytes: int) -> None:
        mesh, rows = self.comm.mesh, num_bytes // 4096
        out, into = [0] * mesh.ep_size, [0] * mesh.ep_size
        out[self.to] = into[self.source] = rows
        data = torch.zeros(rows, 4096, dtype=torch.uint8, device=mesh.device)
        exchange = RowExchange(self.comm, tuple(out), tuple(into))
        all_to_all_rows([data], exchange, directions=("control",), backward_directions=("control",))


def measure_links(comm: Comm, topology: Topology, repeats: int = 3) -> Topology:
    """The topology with rates and latencies as measured: bytes per second and direction when every rank sends.

    Within nodes to the next rank of the node, between them to the same place of the next node. A class of links that
    no two ranks use keeps its rate.
    """
    mesh, width = comm.mesh, topology.ranks_per_node
    node, place = divmod(mesh.ep_rank, width)
    peers = {
        "intra": (node * width + (place + 1) % width, node * width + (place - 1) % width),
        "inter": (
            (node + 1) % topology.num_nodes * width + place,
            (node - 1) % topology.num_nodes * width + place,
        ),
    }
    rates = {"intra": topology.intra_node_bytes_per_second, "inter": topology.inter_node_bytes_per_second}
    latency = {"intra": 0.0, "inter": 0.0}
    for name, (to, source) in peers.items():
        if (width if name == "intra" else topology.num_nodes) < 2:
            continue

        link = _Link(comm, to, source)
        small, large = 4096, 1 << 20
        short, long = _timed(partial(link.send, small), comm, repeats), _timed(partial(link.send, large), comm, repeats)
        while long < LEAST_SECONDS and large < 1 << 26:
            large *= 8
            long = _timed(partial(link.send, large), comm, repeats)
        rates[name] = (large - small) / max(long - short, 1e-9)
        latency[name] = max(0.0, short - small / rates[name])
    comm.meter.take()  # measuring is not part of a step's traffic
    return Topology(
        topology.world_size, width, rates["intra"], rates["inter"], (0.0, latency["intra"], latency["inter"])
    )
