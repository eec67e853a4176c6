"""What a launcher needs on its machine: a temporary folder, a server of rank processes, a store on the loopback.

All of it goes when the launcher does, whatever ends it: `reaper` sees to that from a process of its own.
"""

from __future__ import annotations

import contextlib
import functools
import multiprocessing
import os
import socket
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing import forkserver, util
from pathlib import Path

import torch.distributed as dist

from luffy.lab.place import process_identity
from luffy.train import reaper

LOOPBACK = "127.0.0.1"
LONGEST_FOLDER = 60  # the address of a socket in it has 107 characters at most


@dataclass(frozen=True)
class Scratch:
    """`folder` is this user's alone. `identity` is in the environment of every process that starts here."""

    folder: Path
    identity: str
    reaper: subprocess.Popen[bytes]

    def close(self) -> None:
        """End what still runs and remove the folder. The end of this process does the same."""
        with contextlib.suppress(OSError, subprocess.TimeoutExpired):
            assert self.reaper.stdin is not None
            self.reaper.stdin.close()
            self.reaper.wait(timeout=5)


@functools.cache
def get_scratch() -> Scratch:
    """The one of this process, made at the first call, with the server that ranks are forked from."""
    base = tempfile.gettempdir()
    folder = Path(tempfile.mkdtemp(prefix="luffy-", dir=base if len(base) <= LONGEST_FOLDER else "/tmp"))
    pid = os.getpid()
    identity = process_identity(pid) or str(pid)
    command = [sys.executable, "-I", "-S", reaper.__file__, identity, str(folder)]
    scratch = Scratch(folder, identity, subprocess.Popen(command, stdin=subprocess.PIPE, start_new_session=True))
    # After multiprocessing has removed what it keeps in the folder, which it does at -100.
    util.Finalize(None, _close_in, (pid, scratch), exitpriority=-200)
    # The server and the ranks that it forks keep the environment it begins with; this process need not.
    added = {reaper.VARIABLE: identity, "TORCH_CPP_LOG_LEVEL": os.environ.get("TORCH_CPP_LOG_LEVEL", "ERROR")}
    before, tmp = {name: os.environ.get(name) for name in added}, tempfile.tempdir
    os.environ |= added
    tempfile.tempdir = str(folder)  # for its socket
    try:
        multiprocessing.set_forkserver_preload(["luffy.train.trainer"])
        forkserver.ensure_running()
    finally:
        tempfile.tempdir = tmp
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
    return scratch


def _close_in(pid: int, scratch: Scratch) -> None:
    """A fork of the launcher must not clean up after it."""
    if os.getpid() == pid:
        scratch.close()


def open_store() -> tuple[dist.TCPStore, int]:
    """A store that listens on the loopback only, and its port. torch's own would listen on every interface."""
    listener = socket.create_server((LOOPBACK, 0), backlog=4096)
    port = listener.getsockname()[1]
    store = dist.TCPStore(LOOPBACK, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach())
    return store, port


def loopback_name() -> str:
    """The loopback's interface: "lo" on Linux, "lo0" on BSD and macOS."""
    names = [name for _, name in socket.if_nameindex()]
    return next((name for name in ("lo", "lo0") if name in names), "lo")
