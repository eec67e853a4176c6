"""Signs of life: every rank tells the others where it is, and one that has waited too long says who is late.

Two threads of each rank do it beside the training. One looks at the main thread's stack (luffy.train.whereabouts) and
notes whether it has moved on. The other writes what was seen to the store that the ranks met at, and reads what the
others wrote; a network that does not answer blocks only this one. A main thread that has stood in one collective for
`--timeout-seconds` ends its process with a report, from which one line is made (luffy.train.suspects).
"""

from __future__ import annotations

import contextlib
import datetime
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist

from luffy.comm import Mesh
from luffy.comm.meter import TrafficMeter
from luffy.lab.place import current_lab
from luffy.train.lastwords import end_process, has_launcher, leave_word
from luffy.train.options import TrainOptions
from luffy.train.ranklog import dump_stacks, log_path, say
from luffy.train.suspects import Report, verdict
from luffy.train.whereabouts import Whereabouts, whereabouts

SHORTEST_SECONDS, LONGEST_SECONDS = 0.25, 5.0
PREFIX = "luffy-heartbeat"
# How long other ranks, under torchrun, have to see the same before this one takes the job down.
LAST_LOOK_SECONDS = 1.5

_step = 0


def at_step(step: int) -> None:
    """The trainer's word of progress: it is in step `step` now."""
    global _step
    _step = step


@dataclass
class _Seen:
    """The newest beat of another rank, and when (by this host's clock) it was found to be new."""

    beat: dict[str, Any]
    at: float


@dataclass
class Heartbeat:
    """The heartbeat of rank `rank` of `world_size`, whose training runs in thread `thread`."""

    store: Any
    rank: int
    world_size: int
    timeout_seconds: float
    thread: int
    out: str
    seen: dict[int, _Seen] = field(default_factory=dict)
    _here: Whereabouts | None = None
    _since: float = 0.0
    _answered: float = 0.0
    _number: int = 0
    _over: threading.Event = field(default_factory=threading.Event)

    @property
    def interval(self) -> float:
        return min(LONGEST_SECONDS, max(SHORTEST_SECONDS, self.timeout_seconds / 20))

    def beat(self) -> dict[str, Any]:
        self._number += 1
        here = self._here
        return {
            "number": self._number,
            "step": _step,
            "messages": TrafficMeter.messages,
            "where": here.phrase if here else "its start",
            "waiting": bool(here and here.waiting),
            "host": platform.node(),
        }

    def start(self) -> None:
        self._since = self._answered = time.monotonic()
        self.store.set(self._key(self.rank), json.dumps(self.beat()))
        dist.barrier()  # all have a first beat
        for target in (self._look, self._talk):
            threading.Thread(target=target, name="heartbeat", daemon=True).start()

    def stop(self) -> None:
        self._over.set()

    def _key(self, rank: int) -> str:
        return f"{PREFIX}/{rank}"

    def _talk(self) -> None:
        """Tell and listen, for as long as the store answers."""
        others = [r for r in range(self.world_size) if r != self.rank]
        while not self._over.wait(self.interval):
            try:
                self.store.set(self._key(self.rank), json.dumps(self.beat()))
                values = self.store.multi_get([self._key(r) for r in others]) if others else []
            except Exception as error:
                say(f"heartbeat: the store does not answer ({str(error).splitlines()[0] if str(error) else error!r})")
                return
            self._answered = now = time.monotonic()
            for rank, value in zip(others, values, strict=True):
                beat = json.loads(value)
                if rank not in self.seen or self.seen[rank].beat["number"] != beat["number"]:
                    self.seen[rank] = _Seen(beat, now)

    def _look(self) -> None:
        """Follow the main thread; report when it has waited too long."""
        before = time.monotonic()
        while not self._over.wait(self.interval):
            now = time.monotonic()
            if now - before > 3 * self.interval + 1.0:  # this process, or the machine, stood still
                self._since = self._answered = now
                for seen in self.seen.values():
                    seen.at = now
            before, here = now, whereabouts(self.thread)
            if self._here is None or here.key != self._here.key or not here.waiting:
                self._since = now
            self._here = here
            if now - self._since > self.timeout_seconds:
                self.report(now)

    def report(self, now: float) -> None:
        """End this process with a report of who is late."""
        report = self._report(now)
        say(f"waited {report.waited_seconds:.1f} s in {report.where}; the stacks of this rank:")
        dump_stacks()
        line = verdict([report])
        if not has_launcher():
            # All waiting ranks come here at about the same time; one line is enough.
            time.sleep(LAST_LOOK_SECONDS if self.rank else 0)
        leave_word("late", json.dumps(report.to_dict()) if has_launcher() else line, f"error: {line}")
        if not has_launcher() and not self.rank:
            time.sleep(LAST_LOOK_SECONDS)
        end_process(1)

    def _report(self, now: float) -> Report:
        assert self._here is not None
        lost = self.world_size > 1 and now - self._answered > max(2 * self.interval, self.timeout_seconds / 2)
        silent, behind, hosts, last = {}, {}, {}, {}
        for rank, seen in self.seen.items():
            name, beat = str(rank), seen.beat
            hosts[name], last[name] = beat["host"], f"{beat['where']}, step {beat['step']}"
            if lost:
                continue
            if now - seen.at > max(3 * self.interval, self.timeout_seconds / 2):
                silent[name] = now - seen.at
            elif beat["step"] < _step or (not beat["waiting"] and beat["messages"] <= TrafficMeter.messages):
                behind[name] = last[name]
        lab = current_lab()
        return Report(
            rank=self.rank,
            host=platform.node(),
            step=_step,
            where=self._here.phrase,
            waited_seconds=now - self._since,
            silent=silent,
            behind=behind,
            hosts=hosts,
            last=last,
            store_lost=lost,
            store_rank=0 if lab is not None else None,
            logs=str(log_path(self.out, "N").parent / "rank-*.log"),
        )


@contextmanager
def watching(options: TrainOptions, mesh: Mesh) -> Iterator[None]:
    """Watch over this rank, and tell the others, while the block trains. All ranks enter it."""
    at_step(0)
    store: Any = dist.distributed_c10d._get_default_store()  # torch's stubs lack `clone`
    while isinstance(store, dist.PrefixStore):
        store = store.underlying_store
    connection = dist.PrefixStore(f"{PREFIX}-{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store.clone())
    connection.set_timeout(datetime.timedelta(seconds=max(10.0, options.timeout_seconds)))
    heart = Heartbeat(
        connection, mesh.rank, mesh.world_size, options.timeout_seconds, threading.get_ident(), options.out
    )
    heart.start()
    try:
        yield
    finally:
        heart.stop()
        with contextlib.suppress(Exception):
            say("training ended")
