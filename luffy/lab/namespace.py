"""System calls for network namespaces and for processes that must not outlive their parent.

A namespace here has no name: it lives as long as a process is in it or holds it open, and not a moment longer. The lab
holds its namespaces as open files, so when it and its processes end, in whatever way, `kill -9` included, the kernel
takes down every link and bridge with them. Nothing lies in `/run/netns`, and two labs have nothing to quarrel about.
"""

from __future__ import annotations

import ctypes
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

CLONE_NEWNET = 0x40000000
PR_SET_PDEATHSIG = 1
# Of this thread: /proc/self speaks of the main thread only.
CURRENT = "/proc/thread-self/ns/net"
CAPABILITIES = {"CAP_NET_ADMIN": 12, "CAP_SYS_ADMIN": 21}

# A handle to the C library at import: a child between fork and exec must not begin to search for libraries.
_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, call: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")


def missing_capabilities() -> list[str]:
    """Names of the capabilities that a lab needs and this process lacks."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("CapEff:"):
            held = int(line.split()[1], 16)
            return [name for name, bit in CAPABILITIES.items() if not held >> bit & 1]
    return list(CAPABILITIES)


def enter(namespace: int | str) -> None:
    """Move this thread, and the threads that it starts from now on, into a namespace (open file or path)."""
    if isinstance(namespace, str):
        handle = os.open(namespace, os.O_RDONLY | os.O_CLOEXEC)
        try:
            enter(handle)
        finally:
            os.close(handle)
        return
    _check(_libc.setns(namespace, CLONE_NEWNET), "setns")


@contextmanager
def inside(namespace: int) -> Iterator[None]:
    """Run a block in a namespace; sockets that it opens stay there."""
    home = os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        enter(namespace)
        yield
    finally:
        enter(home)
        os.close(home)


def new_namespace() -> int:
    """An empty network namespace as an open file, with an idle loopback alone. Raises OSError where not allowed."""
    home = os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _check(_libc.unshare(CLONE_NEWNET), "unshare")
        created = os.open(CURRENT, os.O_RDONLY | os.O_CLOEXEC)
        enter(home)
        return created
    finally:
        os.close(home)


def set_network_option(name: str, value: str) -> None:
    """Set `net/NAME` of the namespace this thread is in; one that this kernel lacks is passed over."""
    with suppress(OSError):
        Path("/proc/sys/net", name).write_text(value)


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when the thread that started it ends.

    `parent` is the process that it expects: if that one died before this call, nobody is left to wait for.
    """
    _libc.prctl(PR_SET_PDEATHSIG, int(signal.SIGKILL), 0, 0, 0)
    if os.getppid() != parent:
        os._exit(1)
