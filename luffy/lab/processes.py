"""Starting what runs in a lab, stopping it, and sweeping up after labs that could not.

Three lines of defence see to it that nothing outlives a lab: its children have the kernel's word to be ended with it,
ranks of a training watch it themselves (`place`), and whatever was started further down is found by the lab's name in
its environment, by this lab at its end or by the next one at its start.
"""

from __future__ import annotations

import functools
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType

from luffy.errors import UserError
from luffy.lab.namespace import die_with_parent, enter
from luffy.lab.place import VARIABLE, Lab, current_lab, process_identity
from luffy.signals import handled

POLL_SECONDS = 0.05
# A command that is asked to stop has a step to finish and a checkpoint to write first.
GRACE_SECONDS = 60.0
# The first rank to end is not always the one that failed first: give the others time to be seen.
LOOK_AROUND_SECONDS = 0.5
# Ranks have addresses but no host names, and torch would say so for every connection.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Stopped(KeyboardInterrupt):
    """The lab was asked to stop, by the signal `number`."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


@contextmanager
def stopped_by_signals() -> Iterator[None]:
    """Raise `Stopped` in this block when somebody wants the lab to end."""

    def stop(number: int, _: FrameType | None) -> None:
        raise Stopped(number)

    with handled(SIGNALS, stop):
        yield


@contextmanager
def undisturbed() -> Iterator[None]:
    """Finish this block whatever signals arrive."""
    with handled(SIGNALS, signal.SIG_IGN):
        yield


def _environment(pid: int) -> dict[str, str]:
    try:
        text = Path(f"/proc/{pid}/environ").read_bytes().decode(errors="replace")
    except OSError:
        return {}
    return dict(item.split("=", 1) for item in text.split("\0") if "=" in item)


def processes_of_labs() -> dict[int, str]:
    """Process -> the identity of the lab that it was started in. This process and its ancestors are not listed."""
    found = {}
    for entry in os.listdir("/proc"):
        if entry.isdigit():
            with suppress(UserError):  # a variable that is not ours after all
                lab = current_lab(_environment(int(entry)))
                if lab is not None:
                    found[int(entry)] = lab.identity
    pid = os.getpid()
    while pid > 1:
        found.pop(pid, None)
        try:
            pid = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
        except OSError:
            break
    return found


def end_all(identity: str, patience: float = 0.0) -> None:
    """Kill every process that was started in a lab, and those that they start meanwhile.

    `patience` is the time, in seconds, that they have to end by themselves.
    """
    begin = time.monotonic()
    while time.monotonic() < begin + patience + 5:
        left = [pid for pid, lab in processes_of_labs().items() if lab == identity]
        if not left:
            return
        if time.monotonic() >= begin + patience:
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(POLL_SECONDS)


def sweep() -> int:
    """End what labs have left behind that are no more; how many labs that was."""
    gone = set()
    for identity in set(processes_of_labs().values()):
        if process_identity(int(identity.split("-")[0])) != identity:
            gone.add(identity)
            end_all(identity)
    return len(gone)


def starts_its_own_ranks(command: list[str]) -> bool:
    """Whether a command is this library's command line, which launches ranks itself."""
    if Path(command[0]).name == "luffy":
        return True
    return "python" in Path(command[0]).name and command[1:2] == ["-m"] and command[2:3] == ["luffy.train.cli"]


def resolve(command: list[str]) -> list[str]:
    """The command with its program found; `luffy` is the one that is running. Raises UserError when there is none."""
    if command[0] == "luffy":
        return [sys.executable, "-m", "luffy.train.cli", *command[1:]]
    if shutil.which(command[0]) is None:
        raise UserError(f"luffy lab: no program {command[0]}; check the command after --")
    return command


def _prepare(parent: int, namespace: str | None) -> None:
    """What a child of the lab does before it becomes the command."""
    die_with_parent(parent)
    if namespace is not None:
        enter(namespace)


class Command:
    """The command of a lab: one process, or one for each rank in the rank's own namespace.

    variables: of the environment, beside this process's own.
    """

    def __init__(
        self, command: list[str], lab: Lab, per_rank: bool, variables: Mapping[str, str] | None = None
    ) -> None:
        self.per_rank = per_rank
        self.processes: list[subprocess.Popen[bytes]] = []
        parent = os.getpid()

        for rank in range(lab.ranks) if per_rank else [None]:
            environment = {**QUIET, **os.environ, **(variables or {}), VARIABLE: lab.to_json()}
            namespace = None
            if rank is not None:
                environment |= lab.rank_environment(rank)
                namespace = lab.namespaces[rank]
            prepare = functools.partial(_prepare, parent, namespace)
            self.processes.append(subprocess.Popen(command, env=environment, preexec_fn=prepare))

    def wait(self) -> int:
        """The exit status of the command, in a shell's terms; a rank that fails takes the others down with it."""
        try:
            while True:
                states = [p.poll() for p in self.processes]
                if any(states):
                    return self._failed()
                if all(state == 0 for state in states):
                    return 0
                time.sleep(POLL_SECONDS)
        except Stopped as stop:
            return self._stop(stop.number)

    def _failed(self) -> int:
        if not self.per_rank:
            status = self.processes[0].returncode
            if status < 0:
                _say(f"the command was ended by signal {-status}")
            return _shell_status(status)
        time.sleep(LOOK_AROUND_SECONDS)
        failed = {rank: p.returncode for rank, p in enumerate(self.processes) if p.poll()}
        # A rank that was killed says nothing itself, while those that missed it complain.
        rank = min(failed, key=lambda r: (failed[r] > 0, r))
        status = failed[rank]
        how = f"ended with status {status}" if status > 0 else f"was ended by signal {-status}"
        _say(f"rank {rank} of the command {how}; the other ranks were stopped")
        self._end(signal.SIGTERM)
        return _shell_status(status)

    def _stop(self, number: int) -> int:
        with undisturbed():
            # A terminal sends Ctrl-C to the command as well; a second one would break into its leave-taking.
            if number == signal.SIGINT:
                self._wait_for_end(3.0)
            self._end(signal.SIGTERM)
        statuses = [p.returncode for p in self.processes if p.returncode]
        if not any(status > 0 for status in statuses):
            _say("stopped")
        return _shell_status(max(statuses, default=-number))

    def _wait_for_end(self, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while any(p.poll() is None for p in self.processes):
            if time.monotonic() > deadline:
                return False
            time.sleep(POLL_SECONDS)
        return True

    def _end(self, number: int) -> None:
        for process in self.processes:
            if process.poll() is None:
                process.send_signal(number)
        if not self._wait_for_end(GRACE_SECONDS):
            for process in self.processes:
                process.kill()
            self._wait_for_end(GRACE_SECONDS)


def _shell_status(status: int) -> int:
    return 128 - status if status < 0 else status


def _say(line: str) -> None:
    print(f"luffy: error: {line}", file=sys.stderr, flush=True)
