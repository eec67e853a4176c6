"""The least time that a step could take: computation and wires, whichever is the longer, if they overlapped wholly.

    roofline = max(computation, bytes over a link / what the link was measured to carry)

Bytes are those that the meter counted, the rate is what the lab's probe found with every rank sending at once, and
computation is what the phase clock gave to everything but the exchange and the wait for gradients. Classes of link work
at the same time, so the slowest one counts. A step cannot be faster with these bytes on these links; how near it comes
is how well it overlaps. Only a run that knows its links' rates has one: nothing here is taken from a data sheet.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def link_seconds(summary: Mapping[str, Any], bytes_by_link: Mapping[str, float]) -> dict[str, float]:
    """Seconds that one step keeps each class of link busy, for a run of the lab; {} for any other.

    bytes_by_link: of a step, summed over all ranks. A class has as many links as ranks, or as nodes where all ranks
    of a node share one card; each carries its share in one direction while it receives as much in the other.
    """
    lab = summary.get("lab") or {}
    seconds = {}
    for name, report in (lab.get("links") or {}).items():
        links = lab["nodes"] if name == "inter_node" and lab.get("nic") == "node" else lab["ranks"]
        if rate := report.get("together_bytes_per_second"):
            seconds[name] = bytes_by_link.get(name, 0.0) / links / rate
    return seconds


def roofline(summary: Mapping[str, Any], phases: Mapping[str, float], bytes_by_link: Mapping[str, float]) -> Any:
    """{seconds, bound, compute_seconds, wire_seconds} of a mean step, or None where no rate was measured.

    phases: seconds of a step by phase, what hides behind others left out. bound: "computation" or the class of link.
    """
    wires = link_seconds(summary, bytes_by_link)
    if not wires:
        return None
    compute = sum(value for kind, value in phases.items() if kind not in ("exchange", "gradients"))
    slowest = max(wires, key=lambda name: wires[name])
    return {
        "seconds": max(compute, wires[slowest]),
        "bound": "computation" if compute >= wires[slowest] else slowest,
        "compute_seconds": compute,
        "wire_seconds": wires[slowest],
    }
