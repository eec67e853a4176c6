"""Local ranks from their start to their end: one attempt of a launcher.

Ranks are forked from a server that has imported torch once and has neither threads nor a GPU: quick as a fork, as safe
as a spawn. When one fails, the others are killed within seconds: a rank that is stuck in a collective, or stopped,
hears no request. When the launcher is asked to stop, ranks are told once, and have the time that they need to save.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing.connection import wait
from pathlib import Path
from types import FrameType
from typing import Any

from luffy.errors import StoppedError, UserError
from luffy.signals import handled
from luffy.train.scratch import LOOPBACK, Scratch
from luffy.train.suspects import Report, verdict

POLL_SECONDS = 0.2
# The first rank to end is not always the one that failed first: give the others time to be seen.
LOOK_AROUND_SECONDS = 1.0
# Where a rank left a word, the others have so long: to leave after a mistake or a stop, or to say whom they miss.
PATIENCE_SECONDS = {"user": 0.0, "stopped": 30.0, "late": 2.0}
REQUESTS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)


class RanksLostError(RuntimeError):
    """Ranks died, failed or fell silent; a new attempt may go well."""


@dataclass
class Requests:
    """Signals that ask the launcher to stop. A second Ctrl-C means: at once."""

    number: int | None = None
    at_once: bool = False
    passed_on: bool = False

    def note(self, number: int, _: FrameType | None) -> None:
        self.at_once = self.at_once or (number == signal.SIGINT and self.number == signal.SIGINT)
        self.number = number if self.number is None else self.number

    @contextmanager
    def listening(self) -> Iterator[None]:
        if threading.current_thread() is not threading.main_thread():
            yield  # only a main thread may
            return
        with handled(REQUESTS, self.note):
            yield


@dataclass
class Attempt:
    """`ranks` processes that each call `main(work, args, folder)`; their words about their end come to `folder`."""

    main: Callable[..., None]
    work: Callable[..., Any]
    args: tuple[Any, ...]
    ranks: int
    number: int
    scratch: Scratch
    port: int
    requests: Requests
    processes: list[Any] = field(default_factory=list)
    folder: Path = field(init=False)

    def environment(self, rank: int) -> dict[str, str]:
        """As torchrun would set it."""
        return {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(self.ranks),
            "LOCAL_WORLD_SIZE": str(self.ranks),
            "GROUP_RANK": "0",
            "MASTER_ADDR": LOOPBACK,
            "MASTER_PORT": str(self.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RESTART_COUNT": str(self.number),
        }

    def run(self) -> None:
        """Start the ranks and wait for all. Raises UserError, StoppedError, RanksLostError or RuntimeError."""
        self.folder = Path(tempfile.mkdtemp(dir=self.scratch.folder))  # ports come again, folders must not
        context = multiprocessing.get_context("forkserver")
        surroundings = dict(os.environ)
        try:
            for rank in range(self.ranks):
                arguments = (self.main, self.work, self.args, str(self.folder), os.getpid(), rank)
                environment = surroundings | self.environment(rank)
                process = context.Process(target=begin_rank, args=(environment, *arguments), name=f"rank {rank}")
                process.start()
                self.processes.append(process)
            self._wait()
        finally:
            self._kill()

    def _wait(self) -> None:
        while any(p.exitcode is None for p in self.processes):
            wait([p.sentinel for p in self.processes if p.exitcode is None], POLL_SECONDS)
            if any(p.exitcode for p in self.processes):
                self._look_around()
                break
            if self.requests.number is not None:
                self._pass_on()
        self._explain()

    def _pass_on(self) -> None:
        if self.requests.at_once:
            self._kill()
            raise StoppedError(signal.SIGINT, "stopped at once; add --resume to continue from the last checkpoint")
        if self.requests.passed_on:
            return
        self.requests.passed_on = True
        for process in self.processes:
            if process.exitcode is None:
                os.kill(process.pid, signal.SIGTERM)

    def _look_around(self) -> None:
        """Wait until it can be told who failed first."""
        begin = time.monotonic()
        while any(p.exitcode is None for p in self.processes) and not self.requests.at_once:
            words = {p.name.split("-")[0] for p in self.folder.iterdir()}
            patience = next((s for kind, s in PATIENCE_SECONDS.items() if kind in words), LOOK_AROUND_SECONDS)
            if time.monotonic() - begin > patience or ("late" in words and self._all_reported()):
                return
            time.sleep(0.05)

    def _all_reported(self) -> bool:
        """Whether every rank that is not missed by another has said whom it misses."""
        reports = self._reports()
        missed = {int(rank) for r in reports for rank in r.silent or r.behind}
        return {r.rank for r in reports} | missed == set(range(self.ranks))

    def _reports(self) -> list[Report]:
        return [Report(**json.loads(text)) for text in self._words("late").values()]

    def _kill(self) -> None:
        for process in self.processes:
            if process.exitcode is None:
                process.kill()
        for process in self.processes:
            process.join()

    def _words(self, kind: str) -> dict[int, str]:
        """What ranks wrote about their end: rank -> text, the earliest first."""
        found = sorted(self.folder.glob(f"{kind}-*[0-9]"), key=lambda p: p.stat().st_mtime_ns)
        return {int(p.name.rpartition("-")[2]): p.read_text(encoding="utf-8") for p in found}

    def _explain(self) -> None:
        """Raise what a person should read about how the ranks ended; nothing if all ended well."""
        states = {rank: p.exitcode for rank, p in enumerate(self.processes)}
        if not any(states.values()):
            return
        if user := self._words("user"):
            raise UserError(next(iter(user.values())))
        stopped = self._words("stopped")
        if self.requests.number is not None and (stopped or -signal.SIGTERM in states.values()):
            line = next(iter(stopped.values()), "stopped before its first step; add --resume to continue")
            raise StoppedError(self.requests.number, line)
        crashes, late = self._words("crash"), self._words("late")
        # A rank that was killed says nothing itself.
        for rank, state in states.items():
            if state is not None and state < 0 and rank not in crashes and rank not in late:
                raise RanksLostError(f"rank {rank} was ended by signal {-state}; the other ranks were stopped")
        if late:
            raise RanksLostError(verdict(self._reports()))
        if crashes:
            rank, text = next(iter(crashes.items()))
            raise RanksLostError(f"rank {rank} failed:\n{text}")
        if stopped:
            raise StoppedError(signal.SIGTERM, next(iter(stopped.values())))
        rank, state = next((rank, state) for rank, state in states.items() if state)
        raise RanksLostError(f"rank {rank} ended with status {state}; the other ranks were stopped")


def begin_rank(
    environment: dict[str, str],
    main: Callable[..., None],
    work: Callable[..., Any],
    args: tuple[Any, ...],
    folder: str,
    launcher: int,
    rank: int,
) -> None:
    """A rank's first lines. Ctrl-C is the launcher's matter, which passes it on."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ.clear()
    os.environ |= environment
    main(work, args, folder, launcher)
