"""Ranks that share a GPU compute side by side, as the GPUs of a cluster would.

Processes on one GPU take turns, a time slice each: while one holds it the others stand still, and every exchange waits
for the last. No cluster does that, since there each rank has a GPU. NVIDIA's Multi-Process Service (MPS) has the
kernels of all processes run together, each on a share of the processors. It is an ordinary program of the user, and
changes no setting of the GPU. Where ranks outnumber GPUs the lab runs one of its own, and ends it with the command.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from luffy.lab.namespace import die_with_parent

PROGRAM = "nvidia-cuda-mps-control"
START_SECONDS = 5.0
SIDE_BY_SIDE, IN_TURNS = "side by side", "in turns"


def count_gpus() -> int:
    """GPUs that a command started here would see, without asking CUDA, which could not be used in a child then."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    here = len([p for p in Path("/dev").glob("nvidia*") if p.name.removeprefix("nvidia").isdigit()])
    return here if visible is None else min(here, len([name for name in visible.split(",") if name.strip()]))


@contextmanager
def sharing(ranks: int, gpus: int, environment: dict[str, str]) -> Iterator[tuple[str | None, dict[str, str]]]:
    """How `ranks` ranks share `gpus` GPUs within this block, and the variables that the command needs for it.

    None and nothing where there is nothing to share. environment: of the service, by which the lab finds it again.
    """
    if not 0 < gpus < ranks:
        yield None, {}
        return
    if "CUDA_MPS_PIPE_DIRECTORY" in os.environ:  # the user's own
        yield SIDE_BY_SIDE, {}
        return
    if shutil.which(PROGRAM) is None:
        yield IN_TURNS, {}
        return
    with tempfile.TemporaryDirectory(prefix="luffy-mps-", ignore_cleanup_errors=True) as folder:
        variables = {"CUDA_MPS_PIPE_DIRECTORY": folder, "CUDA_MPS_LOG_DIRECTORY": folder}
        # It serves all GPUs; which of them the command sees is for the command's own CUDA_VISIBLE_DEVICES to say.
        everything = {**environment, **variables}
        everything.pop("CUDA_VISIBLE_DEVICES", None)
        service = subprocess.Popen(
            [PROGRAM, "-f"], env=everything, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL, preexec_fn=functools.partial(die_with_parent, os.getpid()),
        )  # fmt: skip
        try:
            if _is_up(service, Path(folder, "control")):
                yield SIDE_BY_SIDE, variables
            else:
                yield IN_TURNS, {}
        finally:
            _end(service, everything)


def _is_up(service: subprocess.Popen[bytes], pipe: Path) -> bool:
    deadline = time.monotonic() + START_SECONDS
    while service.poll() is None and time.monotonic() < deadline:
        if pipe.exists():
            return True
        time.sleep(0.02)
    return False


def _end(service: subprocess.Popen[bytes], environment: dict[str, str]) -> None:
    """Ask it to end, which ends its server too; insist if it does not."""
    if service.poll() is None:
        with suppress(OSError, subprocess.TimeoutExpired):
            subprocess.run([PROGRAM], input=b"quit -t 1\n", env=environment, capture_output=True, timeout=5)
        with suppress(subprocess.TimeoutExpired):
            service.wait(3)
    if service.poll() is None:
        service.kill()
        service.wait()


def describe(how: str | None, ranks: int, gpus: int) -> str | None:
    """A line for whoever reads what the lab prints."""
    if how is None:
        return None
    line = f"{ranks} ranks share {gpus} GPU{'s' if gpus > 1 else ''} {how}"
    if how == IN_TURNS:
        line += f": no {PROGRAM} runs here, so ranks wait for each other's kernels as those of a cluster would not"
    return line
