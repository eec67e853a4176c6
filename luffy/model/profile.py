"""What attention costs on this device: a few timings at start-up, and the cost model fitted to them.

Where a sequence may be rebuilt depends on the attention that the rank which gets it must then do (`luffy.plan.cost`).
That cost is measured, not read from a data sheet: one attention module of the model runs forward and backward, as a
training step does, on batches of several sizes, and the rates are fitted to the medians. Other batches, of sizes that
the fit has not seen, then tell how far its predictions are off: batches padded to their longest sequence, where
T_att(B, L) speaks, and packed batches of uneven lengths, where the sum of T_att(1, L_i) does.

Batches are run in turn, round after round, so that what else the machine does for a moment falls on one run of many
batches and not on all runs of one. They are added from small to large until the next would not fit the time allowed:
a slow device learns its rates from small batches rather than making the user wait.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from luffy.config import ModelConfig
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.model.attention import Attention
from luffy.plan.cost import SCORE_COSTS, AttentionCost, CostFit, fit_operations

LEAST_BATCHES = 5  # run however slow the device is
ROUNDS = (3, 6)  # at least (if they fit in twice the time allowed), and at most
_CYCLES_PER_SECOND = 2e9  # of a GPU's clock, about
_LONGEST_WAIT = 20e-3
_SMALLEST_SHARE = 32  # no batch is smaller than the largest by more: overhead, not work, would be fitted there


@dataclass(frozen=True)
class Sample:
    """One batch, and how long attention took for it, forward and backward: the median of several runs."""

    lengths: tuple[int, ...]
    padded: bool
    seconds: float


@dataclass(frozen=True)
class AttentionProfile:
    """A fit, the samples it was made from, and those that it was then held against."""

    hidden_size: int
    fit: CostFit
    fitted: tuple[Sample, ...]
    checked: tuple[Sample, ...]

    def predict(self, sample: Sample) -> float:
        """Seconds the fit expects."""
        return float(self.fit.seconds(operations(self.fit.attention_cost(self.hidden_size), sample)))

    def check_errors(self, padded: bool) -> list[float]:
        """|predicted - measured| / measured of the batches of one layout that were not fitted."""
        return [abs(self.predict(s) / s.seconds - 1) for s in self.checked if s.padded == padded]


def operations(cost: AttentionCost, sample: Sample) -> int:
    """Operations of the cost model for a batch: as one grid, or as the sum over its sequences."""
    if sample.padded:
        return int(cost.padded_flops(len(sample.lengths), max(sample.lengths)))
    return int(cost.sequence_flops(sample.lengths).sum())


class AttentionTimer:
    """Times one attention module of `config` on batches of any lengths.

    device, dtype: where the model runs and its stream's dtype. The random weights come from a generator of their own.
    """

    def __init__(self, config: ModelConfig, device: torch.device, dtype: torch.dtype) -> None:
        self.config, self.device, self.dtype = config, device, dtype
        generator = torch.Generator().manual_seed(0)
        with torch.random.fork_rng(devices=[]):
            self.module = Attention(config).to(torch.promote_types(dtype, torch.float32))
        with torch.no_grad():
            for p in self.module.parameters():
                p.copy_(torch.randn(p.shape, generator=generator) * config.init_std)
        self.module.to(device)
        self._launch_seconds = 2e-3

    def batch(self, lengths: Sequence[int], padded: bool) -> TokenBatch:
        table = SequenceTable(np.asarray(lengths, dtype=np.int64), np.zeros(len(lengths), dtype=np.int64))
        layout = Layout(table, 0, self.device)
        generator = torch.Generator().manual_seed(1)
        hidden = torch.randn(layout.num_tokens, self.config.hidden_size, generator=generator)
        return TokenBatch(hidden.to(self.device, self.dtype).requires_grad_(), layout, padded)

    def measure(self, batches: Sequence[tuple[Sequence[int], bool]], budget_seconds: float) -> list[Sample]:
        """Time (lengths, padded) batches, smallest first; those that would take too long are left out."""
        cost = AttentionCost(self.config.hidden_size)
        begin = time.perf_counter()
        made: list[TokenBatch] = []
        seconds: list[list[float]] = []
        empty = [Sample(tuple(lengths), padded, 0.0) for lengths, padded in batches]
        empty.sort(key=lambda s: (operations(cost, s), s.lengths, s.padded))
        for i, sample in enumerate(empty):
            if i >= LEAST_BATCHES:
                growth = operations(cost, sample) / operations(cost, empty[i - 1])
                ahead = (ROUNDS[0] - 1) * sum(t[0] for t in seconds) + (ROUNDS[0] + 1) * growth * seconds[-1][0]
                if time.perf_counter() - begin + ahead > budget_seconds:
                    break
            made.append(self.batch(sample.lengths, sample.padded))
            self._run(made[-1])  # loads kernels and makes the layout's indices
            if i == 0:
                begin = time.perf_counter()  # what a device's very first kernel takes is not the batch's
            seconds.append([self._seconds(made[-1])])
        for done in range(1, ROUNDS[1]):
            if time.perf_counter() - begin > budget_seconds * (1 if done >= ROUNDS[0] else 2):
                break
            for batch, times in zip(made, seconds, strict=True):
                times.append(self._seconds(batch))
        return [Sample(s.lengths, s.padded, float(np.median(t))) for s, t in zip(empty, seconds, strict=False)]

    def _run(self, batch: TokenBatch) -> None:
        output = self.module(batch.hidden, batch)
        output.backward(output.detach())
        batch.hidden.grad = None
        self.module.zero_grad(set_to_none=True)

    def _seconds(self, batch: TokenBatch) -> float:
        if self.device.type != "cuda":
            begin = time.perf_counter()
            self._run(batch)
            return time.perf_counter() - begin
        # Launching the kernels of a small batch takes longer than running them, and a training step launches far ahead
        # of the device. So the device is kept busy until all of them are queued; what is timed is their work.
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        torch.cuda.synchronize(self.device)
        torch.cuda._sleep(int(_CYCLES_PER_SECOND * 1.5 * self._launch_seconds))
        begin = time.perf_counter()
        start.record()
        self._run(batch)
        end.record()
        self._launch_seconds = max(self._launch_seconds, min(time.perf_counter() - begin, _LONGEST_WAIT))
        torch.cuda.synchronize(self.device)
        return float(start.elapsed_time(end)) / 1e3


def lengths_up_to(longest: int, num_sequences: int) -> tuple[int, ...]:
    """Uneven lengths of a batch whose longest sequence is `longest`: evenly spread down to half of it."""
    return tuple(int(n) for n in np.linspace(longest, max(1, longest // 2), num_sequences).round())


def fitted_batches(longest: int, max_tokens: int, padded: bool) -> list[tuple[tuple[int, ...], bool]]:
    """Batches to fit: B a power of four, L the longest length and halves of it, B * L within range of max_tokens."""
    lengths = sorted({max(1, longest // k) for k in (1, 2, 4, 8)})
    sizes = [(B, L) for L in lengths for B in (4**k for k in range(8)) if _in_range(B * L, longest, max_tokens)]
    return [(lengths_up_to(L, B), padded) for B, L in sizes]


def checked_batches(longest: int, max_tokens: int) -> list[tuple[tuple[int, ...], bool]]:
    """Batches that no fit uses: grids of other sizes, and packed batches of lengths from an eighth of longest up."""
    grids = [
        (lengths_up_to(L, B), True)
        for L in sorted({max(2, longest * 3 // 4), max(2, longest * 3 // 8)})
        for B in (2, 8, 32, 128)
        if _in_range(B * L, longest, max_tokens)
    ]
    rng = np.random.default_rng(0)
    packed: list[tuple[tuple[int, ...], bool]] = []
    for share in (1, 2, 4, 8):
        tokens = max(longest, max_tokens // share)
        drawn: list[int] = []
        while sum(drawn) < tokens and len(drawn) < 512:
            drawn.append(max(1, round(longest / 8 ** rng.random())))
        packed.append((tuple(drawn[:-1] if len(drawn) > 1 else drawn), False))
    return [*grids, *packed]


def _in_range(tokens: int, longest: int, max_tokens: int) -> bool:
    most = max(longest, max_tokens)
    return most // _SMALLEST_SHARE <= tokens <= most


def profile_attention(
    config: ModelConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    longest: int | None = None,
    max_tokens: int = 8192,
    padded: bool = False,
    budget_seconds: float = 1.0,
    score_costs: Sequence[int] = SCORE_COSTS,
) -> AttentionProfile:
    """Fit the cost model of `config`'s attention on `device` to batches of up to max_tokens tokens.

    longest: length of the longest sequence (default: the model's). dtype: of the stream. padded: the layout to fit;
    both are checked. budget_seconds: for all runs together, beyond the first one; slow devices exceed it by what
    LEAST_BATCHES small batches take. score_costs: as in `fit_attention_cost`.

    Raises ValueError when the times measured do not grow with the work: the machine was busy with something else.
    """
    longest = longest or config.max_sequence_length
    to_fit = fitted_batches(longest, max_tokens, padded)
    to_check = [b for b in checked_batches(longest, max_tokens) if b not in to_fit]
    samples = AttentionTimer(config, device, dtype).measure([*to_fit, *to_check], budget_seconds)
    fitted = tuple(s for s in samples if (s.lengths, s.padded) in to_fit)
    checked = tuple(s for s in samples if (s.lengths, s.padded) not in to_fit)
    return AttentionProfile(config.hidden_size, fit_samples(config.hidden_size, fitted, score_costs), fitted, checked)


def fit_samples(hidden_size: int, samples: Sequence[Sample], score_costs: Sequence[int] = SCORE_COSTS) -> CostFit:
    """`fit_operations` for batches of any lengths and layout; raises ValueError as it does."""

    def count(score_cost: int) -> list[int]:
        cost = AttentionCost(hidden_size, score_cost=score_cost)
        return [operations(cost, s) for s in samples]

    return fit_operations(count, np.array([s.seconds for s in samples]), score_costs)
