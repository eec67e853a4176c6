"""The faults. Each takes a life that trains, does its worst, and leaves it training again or ended."""

from __future__ import annotations

import os
import random
import re
import shutil
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

from benchmarks.soak.life import Life, pause, send
from luffy.testing.processes import alive, family

Fault = Callable[[Life, random.Random], None]
NAMING_SECONDS = 5.0  # beyond the timeout


def kill_rank(life: Life, dice: random.Random) -> None:
    """The launcher starts all ranks again by itself."""
    _restarts(life, lambda: send(life, [dice.choice(life.ranks)], signal.SIGKILL), r"rank \d was ended by signal 9")


def _restarts(life: Life, action: Callable[[], None], words: str) -> None:
    before = len(re.findall(r"restart \d+ of", life.words))
    action()
    life.wait_for(rf"(?s)(restart \d+ of.*?){{{before + 1}}}", 60)
    if not re.search(words, life.words):
        life.score.note("wrong status or message", life.words[-300:])
    life.wait_for_progress()


def kill_launcher(life: Life, dice: random.Random) -> None:
    assert life.process is not None
    everyone = family(life.process.pid)
    os.kill(life.process.pid, signal.SIGKILL)
    _gone(life, everyone)


def _gone(life: Life, everyone: list[int]) -> None:
    deadline = time.monotonic() + 5
    while (left := alive(everyone)) and time.monotonic() < deadline:
        time.sleep(0.05)
    for pid in left:
        life.score.note("orphans", f"{pid} after the launcher was killed")
    send(life, left, signal.SIGKILL)
    life.wait_for_end((-signal.SIGKILL,))


def kill_launcher_of_a_stopped_rank(life: Life, dice: random.Random) -> None:
    send(life, [dice.choice(life.ranks)], signal.SIGSTOP)
    kill_launcher(life, dice)


def kill_everything(life: Life, dice: random.Random) -> None:
    assert life.process is not None
    everyone = family(life.process.pid)
    life.kill_all()
    # Its cleaner is gone too: what is left is swept away by hand.
    life.process.wait()
    for path in life.temporary.glob("luffy-*"):
        shutil.rmtree(path, ignore_errors=True)
    _gone(life, everyone)


def kill_in_a_checkpoint(life: Life, dice: random.Random) -> None:
    """Wait until one is being written, and kill everything, or the launcher, or a rank."""
    folder = life.out / "checkpoints"
    deadline = time.monotonic() + 20
    while life.running and not list(folder.glob("*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.0005)
    if life.running:
        dice.choice([kill_everything, kill_launcher, kill_rank])(life, dice)


def stop_the_machine(life: Life, dice: random.Random) -> None:
    """All processes stand still for longer than a timeout allows one of them, and go on."""
    assert life.process is not None
    everyone = family(life.process.pid)
    send(life, everyone, signal.SIGSTOP)
    time.sleep(dice.uniform(1.0, 7.0))
    send(life, everyone, signal.SIGCONT)
    life.wait_for_progress()


def stop_a_rank(life: Life, dice: random.Random, timeout: float = 5.0) -> None:
    """It must be named within the timeout plus five seconds; then all ranks are started again."""
    ranks = life.ranks
    number = dice.randrange(len(ranks))
    begin, before = time.monotonic(), life.words.count("is late")
    send(life, [ranks[number]], signal.SIGSTOP)
    life.wait_for(rf"(?s)(is late.*?){{{before + 1}}}", 60)
    seconds = time.monotonic() - begin
    life.score.slowest_naming_seconds = max(life.score.slowest_naming_seconds, seconds)
    said = re.findall(r"rank (\d)[^\n]* is late", life.words)
    if seconds > timeout + NAMING_SECONDS or len(said) <= before or int(said[-1]) != number:
        life.score.note("late ranks not named in time", f"rank {number}, {seconds:.1f} s: {life.words[-300:]}")
    life.wait_for_progress()


def ask_to_stop(life: Life, dice: random.Random) -> None:
    assert life.process is not None
    number = dice.choice([signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
    life.process.send_signal(number)
    life.wait_for_end((128 + number, 0), "")
    if "which is saved" not in life.words and life.process.returncode != 0:
        life.score.note("wrong status or message", life.words[-300:])


def damage(life: Life, dice: random.Random) -> None:
    """Stop it, and damage a file of the newest checkpoint: the one before is taken."""
    ask_to_stop(life, dice)
    found = life.checkpoints
    if len(found) < 2:
        return
    file = dice.choice(sorted(p for p in found[-1].iterdir()))
    how = dice.choice(["flip", "cut", "remove"])
    if how == "remove" and file.name != "meta.json":  # without it there is no checkpoint
        file.unlink()
    elif how == "cut":
        os.truncate(file, dice.randrange(file.stat().st_size))
    else:
        content = bytearray(file.read_bytes())
        content[dice.randrange(len(content))] ^= 1 << dice.randrange(8)
        file.write_bytes(content)
    life.damaged = True
    life.start()
    told = f"checkpoint {found[-1].name} is damaged" in life.words
    if not told or f"resuming after step {int(found[-2].name[5:])}" not in life.words:
        life.score.note("steps lost beyond the last checkpoint", f"{how} {file.name}: {life.words[:300]}")


def fill_the_disk(life: Life, dice: random.Random) -> None:
    """The disk of --out has no room for the next checkpoint; later it has."""
    filler = life.out / "filler"
    free = shutil.disk_usage(life.out).free
    try:
        with open(filler, "wb") as file:
            file.write(b"x" * max(0, free - dice.randrange(1, 200_000)))
    except OSError:
        pass
    life.wait_for_end((2,), "--out")
    filler.unlink(missing_ok=True)
    pause(dice, 0.1)


LOCAL: dict[str, tuple[Fault, int]] = {
    "rank killed": (kill_rank, 6),
    "launcher killed": (kill_launcher, 2),
    "launcher of a stopped rank killed": (kill_launcher_of_a_stopped_rank, 1),
    "everything killed": (kill_everything, 2),
    "killed in a checkpoint": (kill_in_a_checkpoint, 3),
    "machine stood still": (stop_the_machine, 2),
    "rank stopped": (stop_a_rank, 2),
    "asked to stop": (ask_to_stop, 2),
    "file damaged": (damage, 2),
}


def set_link(namespace: str, up: bool) -> None:
    """Cut, or mend, the link of a rank of the lab."""
    subprocess.run(["nsenter", f"--net={namespace}", "ip", "link", "set", "eth0", "up" if up else "down"], check=True)


def slow_link(namespace: str, rate: str) -> None:
    subprocess.run(
        ["nsenter", f"--net={namespace}", "tc", "qdisc", "change", "dev", "eth0", "handle", "10:", "root", "tbf",
         "rate", rate, "burst", "50kb", "limit", "64mb"], check=True,
    )  # fmt: skip


def cut_a_link(life: Life, dice: random.Random, timeout: float = 5.0) -> None:
    """One rank's link: named within the timeout plus five seconds, then mended; ranks start again."""
    number = dice.randrange(2)
    namespace = f"/proc/{life.ranks[number]}/ns/net"
    handle = os.open(namespace, os.O_RDONLY)
    path = f"/proc/{os.getpid()}/fd/{handle}"
    try:
        begin, before = time.monotonic(), life.words.count("is late")
        set_link(path, up=False)
        life.wait_for(rf"(?s)(is late.*?){{{before + 1}}}", 60)
        seconds = time.monotonic() - begin
        life.score.slowest_naming_seconds = max(life.score.slowest_naming_seconds, seconds)
        if seconds > timeout + NAMING_SECONDS or life.words.count("is late") <= before:
            life.score.note("late ranks not named in time", f"cut {number}, {seconds:.1f} s: {life.words[-300:]}")
    finally:
        set_link(path, up=True)
        os.close(handle)
    life.wait_for_progress()


def slow_a_link(life: Life, dice: random.Random) -> None:
    """To a hundredth of its rate, for a while: nothing happens but waiting."""
    namespace = f"/proc/{dice.choice(life.ranks)}/ns/net"
    slow_link(namespace, "3mbit")
    time.sleep(dice.uniform(0.5, 3))
    slow_link(namespace, "200mbit")
    life.wait_for_progress()


LAB: dict[str, tuple[Fault, int]] = {
    "link cut": (cut_a_link, 3),
    "link slowed": (slow_a_link, 2),
    "rank killed in the lab": (kill_rank, 1),
}


def choose(table: dict[str, tuple[Fault, int]], dice: random.Random) -> tuple[str, Fault]:
    names = list(table)
    name = dice.choices(names, [table[n][1] for n in names])[0]
    return name, table[name][0]


def small_disk(path: Path) -> bool:
    """A disk of a few megabytes at `path`; False where this user may not have one."""
    path.mkdir(parents=True, exist_ok=True)
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=8m", "none", path], capture_output=True)
    return mounted.returncode == 0
