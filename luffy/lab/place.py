"""How a training finds its place in a lab.

The lab describes itself to the command that it runs in one environment variable. `luffy train` and `luffy compare`
start their ranks as always; each rank, before it opens a socket, moves into its own namespace of the lab (`take_place`)
and learns where rank 0 is. A training that stands in no lab reads an unset variable, and that is all.

This is the only part of the lab that `luffy.train` imports, so it needs nothing but the standard library.
"""

from __future__ import annotations

import json
import os
import select
import threading
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from luffy.errors import UserError
from luffy.lab.namespace import enter

VARIABLE = "LUFFY_LAB"
# A port in rank 0's own namespace, where nothing else listens.
MASTER_PORT = 29500


def process_identity(pid: int) -> str | None:
    """A name that no later process with the same number will have; None if there is no such process (any more)."""
    try:
        words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return None
    return None if words[0] in "ZX" else f"{pid}-{words[19]}"


@dataclass(frozen=True)
class Lab:
    """A running lab, as its command sees it. `namespaces` are paths; `links` is what the probe found.

    `gpus_shared`: how ranks share GPUs that are fewer than they (`luffy.lab.gpus`); None where they do not.
    """

    identity: str
    ranks: int
    nodes: int
    nic: str
    latency_seconds: float
    topology: str | None
    namespaces: list[str]
    addresses: list[str]
    links: dict[str, dict[str, Any]] = field(default_factory=dict)
    gpus_shared: str | None = None

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @property
    def pid(self) -> int:
        return int(self.identity.split("-")[0])

    def describe(self) -> dict[str, Any]:
        """For `summary.json`: the cluster that the numbers beside it come from."""
        of_this_machine = ("identity", "namespaces", "addresses")
        return {key: value for key, value in asdict(self).items() if key not in of_this_machine}

    @property
    def network(self) -> str:
        """The links in a phrase for a report, as they were measured with all ranks at work."""
        names = {"intra_node": "in a node", "inter_node": f"between nodes ({self.nic} cards)"}
        found = [
            f"{report['together_bytes_per_second'] * 8 / 1e6:.0f} Mbit/s {names[name]}"
            + (f" (asked {asked * 8 / 1e6:.0f})" if (asked := report["asked_bytes_per_second"]) else " (no limit)")
            for name, report in self.links.items()
        ]
        return "emulated links: " + " and ".join(found) if found else "emulated links"

    def rank_environment(self, rank: int) -> dict[str, str]:
        """What torchrun would tell this rank, for its place in the lab."""
        per_node = self.ranks // self.nodes
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_RANK": str(rank % per_node),
            "LOCAL_WORLD_SIZE": str(per_node),
            "GROUP_RANK": str(rank // per_node),
            "MASTER_ADDR": self.addresses[0],
            "MASTER_PORT": str(MASTER_PORT),
            # Rank 0 keeps the store: a launcher's own would be outside, where no rank can reach it.
            "TORCHELASTIC_USE_AGENT_STORE": "False",
            "GLOO_SOCKET_IFNAME": "eth0",
            "TP_SOCKET_IFNAME": "eth0",
            "NCCL_SOCKET_IFNAME": "eth0",
            # NCCL would see that all ranks are on one machine, and go past the links.
            "NCCL_P2P_DISABLE": "1",
            "NCCL_SHM_DISABLE": "1",
            "NCCL_IB_DISABLE": "1",
            "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // self.ranks)),
        }


def current_lab(environment: Mapping[str, str] | None = None) -> Lab | None:
    """The lab that this process was started in, if any."""
    text = (os.environ if environment is None else environment).get(VARIABLE)
    if not text:
        return None
    try:
        return Lab(**json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{VARIABLE} does not describe a lab; unset it, and use luffy lab") from error


def check_ranks(lab: Lab, ranks: int) -> int:
    """How many ranks to start in a lab, which has exactly one place for each."""
    if ranks not in (1, lab.ranks):
        raise UserError(
            f"--ranks {ranks}: the lab has {lab.ranks} ranks; leave it out, or give the lab --ranks {ranks}"
        )
    return lab.ranks


def take_place(rank: int) -> None:
    """Move this process, which is to be rank `rank`, into its namespace, if there is a lab. Call it before any socket.

    From here on the process ends when the lab does, however that comes about.
    """
    lab = current_lab()
    if lab is None:
        return
    try:
        watch = os.pidfd_open(lab.pid)
        if process_identity(lab.pid) != lab.identity:
            raise ProcessLookupError
        enter(lab.namespaces[rank])
    except OSError as error:
        raise UserError(f"{VARIABLE} names a lab that has ended; unset it, or start again under luffy lab") from error
    threading.Thread(target=_end_with, args=(watch,), name="luffy-lab", daemon=True).start()
    os.environ.update(lab.rank_environment(rank))


def end_with(pid: int) -> None:
    """From here on this process ends within moments of process `pid`, whatever ends that one."""
    try:
        watch = os.pidfd_open(pid)
    except AttributeError:  # not Linux
        return
    except OSError:  # it has ended
        os._exit(1)
    threading.Thread(target=_end_with, args=(watch,), name="luffy-launcher", daemon=True).start()


def _end_with(watch: int) -> None:
    """Wait for the end of a process: for a lab, since the launcher may have been killed with it."""
    poll = select.poll()
    poll.register(watch, select.POLLIN)
    poll.poll()
    os._exit(1)
