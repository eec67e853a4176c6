"""Progress that a person watches, and that a log can keep.

On a terminal: one live bar with the loss, the speed, the bytes that left their rank so far, and the time
that remains. Into a pipe or a file (CI, `nohup`): plain lines. The first step and the last always have one,
in between every 5 % of the run; a slow run also shows a sign of life after 10 s, then at growing intervals,
so that a day's log stays readable.

Everything goes to stderr, so that what a command prints as its result can be piped on. Only rank 0 shows
progress; on the others (`enabled=False`) every call is a no-op, and the trainer needs no `if`.
"""

import contextlib
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, SpinnerColumn, TaskID, TextColumn
from rich.table import Column

from luffy.report.runs import column, moved_num_bytes, tokens_per_second
from luffy.report.units import format_bytes, format_count, format_loss, format_rate, format_seconds

PhaseCallback = Callable[[int, int | None, str], None]
"""`progress(done, total_or_None, description)`: what long preparatory work calls as it goes."""

_LINE_SHARE = 0.05
_LINE_SECONDS = 10.0
_LINE_SECONDS_GROWTH = 1.25
_LINE_SECONDS_MOST = 300.0
_RATE_WINDOW = 20  # steps over which the speed is averaged: smooth, yet it follows a change of link or batch


def _stderr_console() -> Console:
    return Console(stderr=True, highlight=False)


def _print_plain(console: Console, line: str) -> None:
    """A line as it is: no markup, and no wrapping at the 80 columns that rich assumes of a pipe."""
    console.print(line, markup=False, highlight=False, soft_wrap=True)


class _LinePacer:
    """Decides which updates deserve a line in a log."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._last_time: float | None = None
        self._last_share = 0.0
        self._wait = _LINE_SECONDS

    def due(self, share: float | None) -> bool:
        """Whether to print now, `share` of the work being done (None: the total is not known)."""
        now = self._clock()
        if self._last_time is not None:
            waited = now - self._last_time >= self._wait
            moved = share is not None and (share >= 1 or share - self._last_share >= _LINE_SHARE - 1e-9)
            if not (waited or moved):
                return False
            if waited:
                self._wait = min(self._wait * _LINE_SECONDS_GROWTH, _LINE_SECONDS_MOST)
        self._last_time, self._last_share = now, share or 0.0
        return True


class TrainProgress:
    """Shows a training run step by step: `with TrainProgress(steps) as progress: ... progress.step(...)`.

    records: of the steps before a resume. Speed and bytes are those of the run so far, as its summary has them.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        start_step: int = 0,
        records: Sequence[Mapping[str, Any]] = (),
        description: str = "train",
        enabled: bool = True,
        console: Console | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.total_steps = total_steps
        self.description = description
        self.enabled = enabled
        self.console = console or _stderr_console()
        moved = moved_num_bytes(records)
        self.num_bytes = int(moved[-1]) if len(moved) else 0
        self._tokens = column(records, "tokens").tolist()
        self._seconds = column(records, "seconds").tolist()
        self._clock = clock
        self._pacer = _LinePacer(clock)
        self._ticks: deque[tuple[int, float]] = deque([(start_step, clock())], maxlen=_RATE_WINDOW + 1)
        self._start_step = start_step
        self._live: Progress | None = None
        self._task = TaskID(0)

    def __enter__(self) -> "TrainProgress":
        if self.enabled and self.console.is_terminal:
            self._live = Progress(
                TextColumn("[bold]{task.description}", table_column=Column(no_wrap=True)),
                BarColumn(bar_width=None, table_column=Column(ratio=1, min_width=6)),
                TextColumn("{task.completed:.0f}/{task.total:.0f}", table_column=Column(no_wrap=True)),
                TextColumn("{task.fields[facts]}", table_column=Column(no_wrap=True)),
                console=self.console,
                expand=True,
            )
            self._task = self._live.add_task(
                self.description, total=self.total_steps, completed=self._start_step, facts=""
            )
            self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _eta_seconds(self, step: int) -> float:
        """Wall time that remains at the pace of the last steps, validation and checkpoints included."""
        first_step, first_time = self._ticks[0]
        if step <= first_step:
            return float("nan")
        return (self.total_steps - step) * (self._ticks[-1][1] - first_time) / (step - first_step)

    def step(self, step: int, *, loss: float, tokens: int, seconds: float, num_bytes: int = 0, note: str = "") -> None:
        """One step is done. `num_bytes` is what it moved; `note` (a validation loss, say) is shown once."""
        if not self.enabled:
            return
        self.num_bytes += num_bytes
        self._ticks.append((step, self._clock()))
        self._tokens.append(tokens)
        self._seconds.append(seconds)
        eta = self._eta_seconds(step)
        due = self._live is not None or self._pacer.due(step / max(1, self.total_steps)) or bool(note)
        rate = tokens_per_second(self._tokens, self._seconds) if due else 0.0
        if self._live is not None:
            moved, left = format_bytes(self.num_bytes), format_seconds(eta)
            facts = f"loss [bold]{format_loss(loss)}[/]  {format_count(rate)} tok/s  {moved}  {left} left"
            self._live.update(self._task, completed=step, facts=facts)
            if note:
                _print_plain(self.console, f"step {step}: {note}")
        elif due:
            width = len(str(self.total_steps))
            line = f"{self.description} {step:>{width}}/{self.total_steps}  loss {format_loss(loss)}"
            line += f"  {format_rate(rate, 'tokens')}  {format_bytes(self.num_bytes)} moved"
            line += f"  {format_seconds(eta)} left" if step < self.total_steps else ""
            _print_plain(self.console, line + (f"  {note}" if note else ""))

    def message(self, text: str) -> None:
        """A line of its own, above the bar."""
        if self.enabled:
            _print_plain(self.console, text)


@contextlib.contextmanager
def phase(
    description: str,
    total: int | None = None,
    *,
    enabled: bool = True,
    console: Console | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[PhaseCallback]:
    """Progress of work before training: `with phase("tokenise") as progress: prepare(progress=progress)`.

    The work calls `progress(done, total_or_None, description)`; a total that is not known yet shows a
    pulse. An empty description keeps the last one.
    """
    console = console or _stderr_console()
    if not enabled:
        yield lambda done, total, description: None
        return
    started = clock()
    name, last_done, last_total = description, 0, total

    def fraction() -> str:
        return format_count(last_done) + (f"/{format_count(last_total)}" if last_total is not None else "")

    if console.is_terminal:
        with Progress(
            SpinnerColumn(),
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[facts]}"),
            console=console,
            transient=True,  # a finished phase leaves one plain line, not a dead bar
        ) as live:
            task = live.add_task(name, total=total, facts="")

            def show(done: int, total: int | None, description: str) -> None:
                nonlocal name, last_done, last_total
                name, last_done, last_total = description or name, done, total
                live.update(task, description=name, completed=done, total=total, facts=fraction())

            yield show
    else:
        pacer = _LinePacer(clock)

        def log(done: int, total: int | None, description: str) -> None:
            nonlocal name, last_done, last_total
            name, last_done, last_total = description or name, done, total
            if pacer.due(done / total if total else None):
                _print_plain(console, f"{name}: {fraction()}" if last_done or last_total else name)

        yield log
    amount = f" {fraction()}" if last_done else ""
    _print_plain(console, f"{description}:{amount} done in {format_seconds(clock() - started)}")
