"""Looking at runs from outside: their processes, their sockets, how far they are. Linux only (/proc)."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from luffy.train.metrics import read_metrics

LUFFY = [sys.executable, "-m", "luffy.train.cli"]
LOOPBACK = {"0100007F", "0000000000000000FFFF00000100007F"}  # 127.0.0.1, as in /proc/net/tcp and tcp6


def start(arguments: Iterable[str], **environment: str) -> subprocess.Popen[str]:
    """`luffy train` as a process of its own."""
    return subprocess.Popen(
        [*LUFFY, "train", *arguments],
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | environment,
    )


def last_step(out: str | Path) -> int:
    """The newest step in a run's record; 0 where there is none."""
    path = Path(out, "metrics.jsonl")
    records = read_metrics(path) if path.exists() else []
    return records[-1]["step"] if records else 0


def losses(out: str | Path) -> list[float]:
    """The loss of each step in a run's record."""
    return [record["loss"] for record in read_metrics(Path(out, "metrics.jsonl"))]


def wait_for_step(out: str | Path, step: int, process: subprocess.Popen[str]) -> None:
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None:
        if last_step(out) >= step:
            return
        time.sleep(0.05)
    process.kill()
    raise AssertionError(process.communicate()[1])


def wait_until(what: Callable[[], Any], seconds: float = 30.0) -> None:
    deadline = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < deadline, "waited in vain"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    found: list[int] = []
    with suppress(OSError):
        for task in Path(f"/proc/{pid}/task").iterdir():
            with suppress(OSError):
                found += map(int, (task / "children").read_text().split())
    return found


def ranks_of(pid: int) -> list[int]:
    """The rank processes of a launcher, in their order: they are forked from its fork server."""
    return sorted(grandchild for child in children(pid) for grandchild in children(child))


def family(pid: int) -> list[int]:
    """A process and all below it."""
    found = [pid]
    for child in children(pid):
        found += family(child)
    return found


def alive(pids: Iterable[int]) -> list[int]:
    """Which of these processes still run; stopped ones do."""
    found = []
    for pid in pids:
        with suppress(OSError):
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX":
                found.append(pid)
    return found


def listening(pids: Iterable[int]) -> list[str]:
    """Local addresses, as in /proc/net/tcp and tcp6, on which these processes listen, each in its own network."""
    found = []
    for pid in pids:
        inodes = set()
        with suppress(OSError):
            for handle in Path(f"/proc/{pid}/fd").iterdir():
                with suppress(OSError):
                    inodes.add(os.readlink(handle).removeprefix("socket:[").rstrip("]"))
            for table in ("tcp", "tcp6"):
                for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]:
                    words = line.split()
                    if words[3] == "0A" and words[9] in inodes:
                        found.append(words[1].split(":")[0])
    return found
