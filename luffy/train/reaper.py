"""Runs beside a launcher and cleans up after it, however it ended: `python reaper.py IDENTITY FOLDER`, stdin a pipe.

The launcher holds the other end of the pipe. When it is closed (a normal end, a crash, `kill -9`), every process that
was started for the launcher is killed, and its temporary folder is removed. Such processes are known by a variable in
the environment that they began with. The standard library only, and no imports of luffy: it starts in milliseconds.
"""

import contextlib
import os
import shutil
import signal
import sys
import time

VARIABLE = "LUFFY_LAUNCH"
LIMIT_SECONDS = 10.0


def members(identity: str) -> list[int]:
    """Processes that were started for the launcher `identity`, stopped ones included; zombies have no environment."""
    word, found = f"{VARIABLE}={identity}".encode(), []
    for name in os.listdir("/proc"):
        if not name.isdigit() or int(name) == os.getpid():
            continue
        with contextlib.suppress(OSError), open(f"/proc/{name}/environ", "rb") as file:
            if word in file.read().split(b"\0"):
                found.append(int(name))
    return found


def clean_up(identity: str, folder: str) -> None:
    """Kill the members, and those that they start meanwhile; then remove the folder."""
    deadline = time.monotonic() + LIMIT_SECONDS
    while os.path.isdir("/proc") and (left := members(identity)) and time.monotonic() < deadline:
        for pid in left:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.02)
    shutil.rmtree(folder, ignore_errors=True)


if __name__ == "__main__":
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_IGN)
    sys.stdin.buffer.read()
    clean_up(*sys.argv[1:3])
