"""The wires of the lab: virtual switches in a namespace of their own, and token buckets at both ends of every link.

A link is a pair of virtual network interfaces, one end with the rank, the other in a switch (a bridge). An interface is
shaped where it *sends*: the rank's end holds what the rank sends to the rate, the switch's end what the rank receives.
Three senders to one rank therefore share what that rank can take, as on a real switch, and the two directions are free
of each other.

Nothing leads outside: the switches are not in the machine's own network, and no rank has a route beyond its cluster.

Three choices make the wires narrow and otherwise ideal:

* **Deep queues.** A switch that drops packets would turn every all-to-all into TCP's time-outs (200 ms each). Fabrics
  built for training do not drop, so neither do these.
* **Short bursts.** A token bucket lets through what it saved up while idle. It holds two milliseconds' worth, so that
  small messages are not carried for nothing.
* **Jumbo frames** of 9000 bytes, so that headers cost one percent of the rate that was asked for.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from luffy.errors import UserError
from luffy.lab.namespace import inside, new_namespace, set_network_option
from luffy.lab.spec import LabSpec

MTU = 9000
BURST_SECONDS = 2e-3
MIN_BURST_BYTES = 2 * MTU
QUEUE_BYTES = 64 * 2**20
LINK, CARD = "eth0", "net0"  # a rank's ends: its node's switch, and its network card where there are several nodes
_ABSENT = (errno.ENOENT, errno.EOPNOTSUPP, errno.ENOSYS)  # a kernel's answers where it was built without something


def import_pyroute2() -> Any:
    """The netlink library, or the one line that says how to get it."""
    try:
        import pyroute2
    except ImportError:
        raise UserError("luffy lab needs the package pyroute2, which is not installed: pip install pyroute2") from None
    return pyroute2


@contextmanager
def _needing(what: str, mend: str = "run the lab on another machine") -> Iterator[None]:
    """Turn a kernel's refusal into a line."""
    error_type = import_pyroute2().NetlinkError
    try:
        yield
    except (error_type, OSError) as error:
        number = getattr(error, "code", None) or getattr(error, "errno", None) or 0
        if number in _ABSENT:
            raise UserError(f"luffy lab: this machine's kernel has no {what}; {mend}") from error
        reason = os.strerror(number) if number else str(error)
        raise UserError(f"luffy lab: this machine refuses {what} ({reason}); {mend}") from error


class Network:
    """The namespaces and links of one lab. Closing it, or the end of the process, takes all of it down.

    `namespaces[r]` is rank r's namespace, an open file. Raises UserError when the machine does not allow it.
    """

    def __init__(self, spec: LabSpec) -> None:
        self.spec = spec
        self.namespaces: list[int] = []
        self._pyroute2 = import_pyroute2()
        self._sockets: list[Any] = []
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        finally:
            self._close_sockets()

    def _build(self) -> None:
        spec = self.spec
        self._switch, switch = self._namespace()
        several = spec.nodes > 1
        for node in range(spec.nodes):
            self._bridge(switch, f"node{node}")
            if several and spec.nic == "node":
                self._bridge(switch, f"card{node}")
        if several:
            self._bridge(switch, "core")
            if spec.nic == "node":
                for node in range(spec.nodes):
                    self._card_of_node(switch, node)
        for rank in range(spec.ranks):
            namespace, inside_rank = self._namespace()
            self.namespaces.append(namespace)
            node = spec.node_of(rank)
            self._cable(switch, f"r{rank}", f"node{node}", namespace, inside_rank, LINK, spec.link)
            if several and spec.nic == "node":
                self._cable(switch, f"n{rank}", f"card{node}", namespace, inside_rank, CARD, None)
            elif several:
                self._cable(switch, f"n{rank}", "core", namespace, inside_rank, CARD, spec.inter_link)
            self._give_address(inside_rank, rank, several)

    def _namespace(self) -> tuple[int, Any]:
        """A namespace without IPv6 chatter and a netlink socket into it."""
        with _needing("network namespaces"):
            namespace = new_namespace()
            with inside(namespace):
                for which in ("all", "default"):
                    set_network_option(f"ipv6/conf/{which}/disable_ipv6", "1")
                    set_network_option(f"ipv4/conf/{which}/rp_filter", "0")
                # The same congestion control everywhere, whatever this machine's own default is.
                set_network_option("ipv4/tcp_congestion_control", "cubic")
                connection = self._pyroute2.IPRoute()
        self._sockets.append(connection)
        connection.link("set", index=1, state="up")
        return namespace, connection

    @staticmethod
    def _index(connection: Any, name: str) -> int:
        return connection.link_lookup(ifname=name)[0]

    def _bridge(self, switch: Any, name: str) -> None:
        with _needing("virtual switches (bridge)"):
            switch.link("add", ifname=name, kind="bridge")
            switch.link("set", index=self._index(switch, name), mtu=MTU, state="up")

    def _plug(self, switch: Any, name: str, bridge: str) -> None:
        index = self._index(switch, name)
        switch.link("set", index=index, mtu=MTU, master=self._index(switch, bridge), state="up")

    def _cable(
        self, switch: Any, name: str, bridge: str, namespace: int, inside_rank: Any, end: str, rate: float | None
    ) -> None:
        """A link between a rank's interface `end` and a bridge, held to `rate` in each direction."""
        with _needing("virtual links (veth)"):
            switch.link("add", ifname=name, kind="veth", peer={"ifname": end, "net_ns_fd": namespace})
            self._plug(switch, name, bridge)
            inside_rank.link("set", index=self._index(inside_rank, end), mtu=MTU, state="up")
        delay = self.spec.latency_seconds
        self._shape(inside_rank, end, rate, delay)
        self._shape(switch, name, rate)

    def _card_of_node(self, switch: Any, node: int) -> None:
        """The one network card of a node: what its ranks' cables meet in, and its link to the other nodes."""
        with _needing("virtual links (veth)"):
            switch.link("add", ifname=f"up{node}", kind="veth", peer={"ifname": f"down{node}"})
            self._plug(switch, f"up{node}", f"card{node}")
            self._plug(switch, f"down{node}", "core")
        self._shape(switch, f"up{node}", self.spec.inter_link)
        self._shape(switch, f"down{node}", self.spec.inter_link)

    def _shape(self, connection: Any, name: str, rate: float | None, delay: float = 0.0) -> None:
        """Hold what an interface sends to `rate`, after `delay` seconds on the way."""
        index = self._index(connection, name)
        parent = None
        if delay:
            mend = "leave --latency out"
            with _needing("scheduler for delays (sch_netem)", mend):
                connection.tc("add", "netem", index, handle="1:", delay=round(delay * 1e6), limit=10**6)
            parent = "1:1"
        if rate is not None:
            burst = max(MIN_BURST_BYTES, int(rate * BURST_SECONDS))
            place = {"parent": parent} if parent else {}
            with _needing("token buckets (sch_tbf)", "leave --link and --inter-link out"):
                connection.tc(
                    "add", "tbf", index, handle="10:", rate=int(rate), burst=burst, limit=QUEUE_BYTES, **place
                )

    def _give_address(self, inside_rank: Any, rank: int, several: bool) -> None:
        """One address a rank; which interface leads to a peer is a matter of the peer's node."""
        address = self.spec.address(rank)
        inside_rank.addr("add", index=self._index(inside_rank, LINK), address=address, prefixlen=24)
        if several:
            card = self._index(inside_rank, CARD)
            inside_rank.route("add", dst="10.77.0.0/16", oif=card, prefsrc=address, scope="link")

    def _close_sockets(self) -> None:
        for connection in self._sockets:
            with suppress(Exception):
                connection.close()
        self._sockets = []

    def close(self) -> None:
        """Let go of the namespaces; the kernel removes each one that no process is left in."""
        for namespace in [*self.namespaces, *([self._switch] if hasattr(self, "_switch") else [])]:
            with suppress(OSError):
                os.close(namespace)
        self.namespaces = []
        if hasattr(self, "_switch"):
            del self._switch
