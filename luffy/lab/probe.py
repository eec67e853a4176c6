"""What the wires really give, measured with plain TCP before anything runs on them.

A rate that was asked for is a limit, not a promise: the machine's processors carry every byte of every link, and may
not keep up. So each class of link is measured twice, always in both directions at once: between one pair of ranks with
nothing else on the wires, and with every rank sending at the same time, as in a collective. Results are per link and
direction, so that both compare with the rate that was asked for.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import struct
import time
from dataclasses import asdict, dataclass
from typing import Any

from luffy.lab.namespace import die_with_parent, inside
from luffy.lab.network import Network

WARMUP_SECONDS = 0.2
MEASURE_SECONDS = 0.6
ROUND_TRIPS = 30
CHUNK = 1 << 18
Flow = tuple[int, int]  # sending rank, receiving rank


@dataclass(frozen=True)
class LinkReport:
    """One class of link, in bytes per second and direction of one link.

    `alone` is the slower direction of one pair of ranks, `together` the mean over all links while every rank sends.
    `asked_bytes_per_second` is None for a link without a limit. `latency_seconds` is half a round trip of one byte.
    """

    asked_bytes_per_second: float | None
    alone_bytes_per_second: float
    together_bytes_per_second: float
    latency_seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def measure(network: Network) -> dict[str, LinkReport]:
    """One report for each class that this cluster has: "intra_node", "inter_node"."""
    spec = network.spec
    per_node = spec.ranks_per_node
    reports = {}
    if per_node > 1:
        ring = [(r, spec.node_of(r) * per_node + (r + 1) % per_node) for r in range(spec.ranks)]
        reports["intra_node"] = _measure_class(network, spec.link, (0, 1), ring, spec.ranks)
    if spec.nodes > 1:
        ring = [(r, (r + per_node) % spec.ranks) for r in range(spec.ranks)]
        links = spec.nodes if spec.nic == "node" else spec.ranks
        reports["inter_node"] = _measure_class(network, spec.inter_link, (0, per_node), ring, links)
    return reports


def _measure_class(network: Network, asked: float | None, pair: Flow, ring: list[Flow], num_links: int) -> LinkReport:
    first, second = pair
    latency = _half_round_trip(network, pair)
    both = [(first, second), (second, first)]
    alone = run_flows(network, both)
    together = run_flows(network, ring) if set(ring) != set(both) else alone
    return LinkReport(asked, min(alone), sum(together) / num_links, latency)


def connect(network: Network, flow: Flow) -> tuple[socket.socket, socket.socket]:
    """A TCP connection from one rank to another: (the sender's socket, the receiver's)."""
    source, target = flow
    with inside(network.namespaces[target]):
        listener = socket.create_server((network.spec.address(target), 0))
    with listener:
        with inside(network.namespaces[source]):
            sender = socket.create_connection(listener.getsockname(), timeout=10)
        receiver, _ = listener.accept()
    for end in (sender, receiver):
        end.settimeout(None)
        end.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    return sender, receiver


def _half_round_trip(network: Network, flow: Flow) -> float:
    here, there = connect(network, flow)
    with here, there:
        times = []
        for _ in range(ROUND_TRIPS):
            begin = time.perf_counter()
            here.sendall(b"?")
            there.recv(1)
            there.sendall(b"!")
            here.recv(1)
            times.append(time.perf_counter() - begin)
    return statistics.median(times) / 2


def run_flows(network: Network, flows: list[Flow]) -> list[float]:
    """Send along all flows at once; what each receiver got, in bytes per second."""
    connections = [connect(network, flow) for flow in flows]
    children, answers = [], []
    try:
        for sender, receiver in connections:
            children.append(_fork(lambda sock=sender: _send(sock)))
            source, sink = os.pipe()
            answers.append(source)
            children.append(_fork(lambda sock=receiver, out=sink: _receive(sock, out)))
            os.close(sink)
        for pair in connections:
            for end in pair:
                end.close()
        return [_hear(source, flow) for source, flow in zip(answers, flows, strict=True)]
    finally:
        for child in children:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        for source in answers:
            os.close(source)


def _hear(source: int, flow: Flow) -> float:
    answer = os.read(source, 8)
    if len(answer) < 8:
        raise RuntimeError(f"the probe's bytes from rank {flow[0]} to rank {flow[1]} did not arrive")
    return struct.unpack("d", answer)[0]


def _fork(work: Any) -> int:
    """A child that does nothing but `work`, and ends with this process if not before."""
    parent = os.getpid()
    child = os.fork()
    if child == 0:
        try:
            for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
                signal.signal(number, signal.SIG_IGN)
            die_with_parent(parent)
            work()
        finally:
            os._exit(0)
    return child


def _send(sock: socket.socket) -> None:
    data = bytes(CHUNK)
    # What is still queued when the parent ends this child is not to travel on into the next measurement.
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    while True:
        sock.sendall(data)


def _receive(sock: socket.socket, out: int) -> None:
    """Count from the first bytes after the warm-up to the last before the end."""
    buffer = bytearray(CHUNK)
    sock.settimeout(10)
    begin = time.perf_counter()
    first = last = 0.0
    num_bytes = 0
    while last < begin + WARMUP_SECONDS + MEASURE_SECONDS:
        received = sock.recv_into(buffer)
        last = time.perf_counter()
        if first:
            num_bytes += received
        elif last > begin + WARMUP_SECONDS:
            first = last
    os.write(out, struct.pack("d", num_bytes / (last - first) if last > first else 0.0))
    signal.pause()  # until the parent has heard all: a flow that ends early would leave room to the others


def format_rate(bytes_per_second: float | None) -> str:
    if bytes_per_second is None:
        return "no limit"
    bits = bytes_per_second * 8
    return f"{bits / 1e9:.3g} Gbit/s" if bits >= 1e9 else f"{bits / 1e6:.3g} Mbit/s"


def table(reports: dict[str, LinkReport], nic: str) -> str:
    """One row a class of link, and a line of warning where the machine does not keep up."""
    names = {"intra_node": "in a node, each rank", "inter_node": f"between nodes, each {nic}"}
    rows: list[tuple[str, ...]] = [("link", "asked", "one pair", "all at once", "latency")]
    for key, r in reports.items():
        rates = (r.asked_bytes_per_second, r.alone_bytes_per_second, r.together_bytes_per_second)
        rows.append((names[key], *map(format_rate, rates), f"{r.latency_seconds * 1e6:.0f} us"))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
    slow = [r for r in reports.values() if r.together_bytes_per_second < 0.8 * (r.asked_bytes_per_second or 0)]
    if slow:
        lines.append("this machine's processors cannot fill these links: go by what was measured, or ask for less")
    return "\n".join(lines)
