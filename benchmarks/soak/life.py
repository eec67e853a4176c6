"""One life of a run: started, disturbed, continued until it is finished, then compared with an undisturbed one."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from luffy.testing.processes import LOOPBACK, LUFFY, alive, children, family, last_step, listening
from luffy.train.checkpoint_files import list_checkpoints
from luffy.train.metrics import read_metrics

ORPHAN_SECONDS = 5.0
START_SECONDS = 120.0
END_SECONDS = 120.0


@dataclass
class Score:
    """What the soak counts. Every entry of `wrong` must stay at zero."""

    faults: Counter[str] = field(default_factory=Counter)
    wrong: dict[str, list[str]] = field(
        default_factory=lambda: {
            "steps lost beyond the last checkpoint": [],
            "orphans": [],
            "open sockets": [],
            "files left in the temporary folder": [],
            "ends that differ": [],
            "late ranks not named in time": [],
            "wrong status or message": [],
            "runs that hang": [],
        }
    )
    resumes: int = 0
    ends: int = 0
    slowest_naming_seconds: float = 0.0

    def wrong_ones(self) -> int:
        return sum(map(len, self.wrong.values()))

    def note(self, what: str, detail: str) -> None:
        self.wrong[what].append(detail)


@dataclass
class Life:
    """A run in folder `out`. notes: folder for what it says. prefix: of its command, such as `luffy lab ... --`."""

    out: Path
    arguments: list[str]
    score: Score
    temporary: Path
    notes: Path
    prefix: list[str] = field(default_factory=list)
    process: subprocess.Popen[bytes] | None = None
    number: int = 0
    damaged: bool = False

    @property
    def words(self) -> str:
        path = self.words_path
        return path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    @property
    def words_path(self) -> Path:
        """What the newest start says; not on the disk that is filled."""
        return self.notes / f"{self.out.name}.{self.number}.txt"

    @property
    def checkpoints(self) -> list[Path]:
        return list_checkpoints(self.out / "checkpoints")

    def start(self) -> None:
        """Begin, or continue; wait until it trains."""
        self.number += 1
        self.expected = int(self.checkpoints[-1].name[5:]) if self.checkpoints else 0
        resume = ["--resume"] if self.number > 1 else []
        command = [*LUFFY, *self.prefix, *([*LUFFY] if self.prefix else []), "train", *self.arguments, *resume]
        with open(self.words_path, "wb") as words:
            self.process = subprocess.Popen(
                command, stdout=subprocess.DEVNULL, stderr=words, start_new_session=True,
                env=os.environ | {"TMPDIR": str(self.temporary)},
            )  # fmt: skip
        self._wait(lambda: re.search(r"^train .*\d+/", self.words, re.M), START_SECONDS)
        if resume and self.running:
            self.score.resumes += 1
            said = re.search(r"resuming after step (\d+)", self.words)
            step = int(said[1]) if said else 0
            if not self.damaged and step != self.expected:
                self.score.note("steps lost beyond the last checkpoint", f"{step}, not {self.expected}")
            self.damaged = False
        self.look()

    @property
    def running(self) -> bool:
        return self.process is not None and self.process.poll() is None

    @property
    def ranks(self) -> list[int]:
        assert self.process is not None
        servers = [pid for pid in family(self.process.pid) if b"forkserver" in _command(pid)]
        return sorted(pid for server in servers for pid in children(server))

    def look(self) -> None:
        """Count sockets that listen elsewhere than on the loopback (a lab's ranks are in networks of their own)."""
        if self.running and not self.prefix:
            assert self.process is not None
            for address in listening(family(self.process.pid)):
                if address not in LOOPBACK:
                    self.score.note("open sockets", address)

    def _wait(self, what: object, seconds: float) -> bool:
        deadline = time.monotonic() + seconds
        while self.running and time.monotonic() < deadline:
            if callable(what) and what():
                return True
            time.sleep(0.05)
        if self.running:
            self.score.note("runs that hang", self.words[-300:])
            self.kill_all()
        return False

    def wait_for(self, pattern: str, seconds: float) -> bool:
        """Until its words match; False where it ends, or hangs, before."""
        return self._wait(lambda: re.search(pattern, self.words), seconds)

    def wait_for_progress(self, steps: int = 1) -> bool:
        step = last_step(self.out)
        return self._wait(lambda: last_step(self.out) >= step + steps, END_SECONDS)

    def kill_all(self) -> None:
        """As a machine's loss of power would: everything at once."""
        assert self.process is not None
        for pid in family(self.process.pid):
            _send(pid, signal.SIGKILL)

    def wait_for_end(self, statuses: tuple[int, ...], words: str = "") -> None:
        """Wait for the launcher's end; nothing of it may be left."""
        assert self.process is not None
        everyone = family(self.process.pid)
        try:
            status = self.process.wait(END_SECONDS)
        except subprocess.TimeoutExpired:
            self.score.note("runs that hang", self.words[-300:])
            self.kill_all()
            status = self.process.wait()
        if status not in statuses or (words and words not in self.words) or "Traceback" in self.words:
            self.score.note("wrong status or message", f"{status}: {self.words[-400:]}")
        deadline = time.monotonic() + ORPHAN_SECONDS
        while (left := alive(everyone)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for pid in left:
            self.score.note("orphans", f"{pid} {_command(pid)[:100]!r}")
            _send(pid, signal.SIGKILL)
        while (files := _left_in(self.temporary)) and time.monotonic() < deadline:
            time.sleep(0.05)
        for name in files:
            self.score.note("files left in the temporary folder", name)
            shutil.rmtree(self.temporary / name, ignore_errors=True)

    def finish(self, losses: list[float]) -> None:
        """Continue to the end without a fault, and compare."""
        if not self.running:
            self.start()
        self.wait_for_end((0,))
        found = [r["loss"] for r in read_metrics(self.out / "metrics.jsonl")]
        self.score.ends += 1
        if found != losses:
            at = next((i for i, (a, b) in enumerate(zip(found, losses, strict=False)) if a != b), len(found))
            self.score.note("ends that differ", f"{self.out.name} from step {at + 1} of {len(losses)}")


def _left_in(folder: Path) -> list[str]:
    return [p.name for p in folder.iterdir() if not p.name.startswith("torchinductor")]


def _command(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def _send(pid: int, number: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, number)


def send(life: Life, pids: list[int], number: int) -> None:
    for pid in pids:
        _send(pid, number)


def pause(dice: random.Random, longest: float) -> None:
    time.sleep(dice.uniform(0, longest))
