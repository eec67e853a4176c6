"""Layers of alike copies, and the fused decision what to condense held to the one in torch on them.

`exact` rows leave no room for rounding: entries of +-1 and 0, as many as a power of four, times a power of two. Their
lengths, products and cosines are exact in every format, thresholds can be hit exactly, and ties are frequent: both
paths must give the same answer bit for bit. Other rows are Gaussian; there the threshold is put where no cosine is
near, and what is chosen must be as alike.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
from torch import Tensor

from luffy.condensation import Condensation
from luffy.data.batch import Layout, SequenceTable
from luffy.exchange.condense import Condensed, CondenseState, History, condense, find_groups, make_windows, only_sent
from luffy.exchange.copies import CopyKeys, ExpertMap, copy_keys

ROUNDING = 2e-5  # of a cosine: sums of up to 4096 products in float32, in another order


@dataclass(frozen=True)
class AlikeLayer:
    """What one rank's layer has to decide on; x [T, D], ids [T, K]. Rank 0 of `ep_size` decides."""

    x: Tensor
    ids: Tensor
    lengths: tuple[int, ...]
    num_experts: int
    ep_size: int
    pairs: bool = False
    elsewhere: int = 7  # tokens of an earlier sequence, which lives on another rank

    def to(self, device: torch.device) -> AlikeLayer:
        return replace(self, x=self.x.to(device), ids=self.ids.to(device))

    @cached_property
    def layout(self) -> Layout:
        first = np.array([self.elsewhere, *self.lengths])  # so global tokens are not local rows
        return Layout(SequenceTable(first, np.array([1] + [0] * len(self.lengths))), 0, self.x.device)

    @cached_property
    def experts(self) -> ExpertMap:
        return ExpertMap(torch.arange(self.num_experts, device=self.x.device), self.num_experts // self.ep_size)

    @cached_property
    def keys(self) -> CopyKeys:
        return copy_keys(self.ids, self.experts, 0, "pairs" if self.pairs else "ranks")

    def decide(
        self, scheme: Condensation, threshold: float, *, causal: bool, by_sequence: bool, kernel: bool | None
    ) -> Condensed:
        return self.decide_after(None, scheme, threshold, causal=causal, by_sequence=by_sequence, kernel=kernel)[0]

    def decide_after(
        self,
        history: History | None,
        scheme: Condensation,
        threshold: float,
        *,
        causal: bool,
        by_sequence: bool,
        kernel: bool | None,
    ) -> tuple[Condensed, History | None]:
        """The same, knowing what the block before found, and what this one did."""
        state = CondenseState(scheme, [threshold] * 4)
        return condense(
            state, 3, self.x, self.ids, self.keys, self.layout, self.experts, 0, causal=causal,
            by_sequence=by_sequence, pairs=self.pairs, history=history, kernel=kernel,
        )  # fmt: skip


def alike_layer(
    seed: int, lengths: tuple[int, ...], size: int, num_experts: int, top_k: int, ep_size: int = 2, *,
    dtype: torch.dtype = torch.float32, exact: bool = True, pairs: bool = False, odd_rows: bool = True,
) -> AlikeLayer:  # fmt: skip
    """Rows in clusters. Experts are chosen unevenly, some by nobody; a few choices are dropped (expert -1).

    odd_rows: among them rows of zeros, of NaN and with an infinity.
    """
    g = torch.Generator().manual_seed(seed)
    T = sum(lengths)
    cluster = torch.randint(max(1, T // 12), (T,), generator=g)
    if exact:
        n = 4 ** int(np.log2(size) // 2)
        x = torch.zeros(T, size)
        sign = torch.randint(0, 2, (int(cluster.max()) + 1 if T else 1, n), generator=g) * 2.0 - 1
        # 0, 1/8, 1/4 or 1/2 of the signs are turned: cosines of 1, 3/4, 1/2 and 0 to the centre
        share = torch.tensor([0, 1 / 8, 1 / 4, 1 / 2])[torch.randint(4, (T, 1), generator=g)]
        turn = torch.rand(T, n, generator=g).argsort(1) < share * n
        at = torch.randperm(size, generator=g)[:n]
        x[:, at] = sign[cluster] * torch.where(turn, -1.0, 1.0)
        x *= 2.0 ** torch.randint(-3, 4, (T, 1), generator=g)
    else:
        x = torch.randn(T // 12 + 1, size, generator=g)[cluster] + 0.4 * torch.randn(T, size, generator=g)
    if odd_rows and T > 20:
        x[1], x[5], x[8, 0], x[13, size - 1] = 0, torch.nan, torch.nan, torch.inf
        x[T // 2 :: 17] = 0
    popularity = 0.5 * torch.rand(num_experts, generator=g)
    if num_experts > top_k + 1:
        popularity[-1] = -9  # nobody's choice
    ids = (popularity + 0.7 * torch.rand(T, num_experts, generator=g)).topk(top_k).indices
    ids[torch.rand(T, top_k, generator=g) < 0.03] = -1
    return AlikeLayer(x.to(dtype), ids, lengths, num_experts, ep_size, pairs)


def compare_exactly(
    layer: AlikeLayer, scheme: Condensation, threshold: float, *, causal: bool, by_sequence: bool, device: torch.device
) -> int:
    """Both paths on exact rows: the same answer, and the same keys of what is sent. Returns the copies condensed."""
    return compare_blocks([layer], scheme, threshold, causal=causal, by_sequence=by_sequence, device=device)


def compare_blocks(
    blocks: list[AlikeLayer], scheme: Condensation, threshold: float, *, causal: bool, by_sequence: bool,
    device: torch.device,
) -> int:  # fmt: skip
    """`compare_exactly` of consecutive blocks, each knowing what the one before found."""
    flags = {"causal": causal, "by_sequence": by_sequence}
    before: History | None = None
    there_before: History | None = None
    condensed = 0
    for i, layer in enumerate(blocks):
        there = layer.to(device)
        expected, before = layer.decide_after(before, scheme, threshold, kernel=False, **flags)
        got, there_before = there.decide_after(there_before, scheme, threshold, kernel=True, **flags)
        names = ("leader", "sent", "shared")
        problems = [_difference(n, getattr(expected, n), getattr(got, n)) for n in names]
        keys, new_keys = only_sent(layer.keys, expected), only_sent(there.keys, got)
        problems += [_difference(n, getattr(keys, n), getattr(new_keys, n)) for n in ("is_copy", "rank")]
        name = f"block {i}: {_name(layer, scheme, threshold, flags, device)}"
        assert not any(problems), "\n".join([name, *filter(None, problems)])
        condensed += int((expected.copy & ~expected.sent).sum())
    return condensed


def compare_closely(
    layer: AlikeLayer, scheme: Condensation, near: float, *, causal: bool, by_sequence: bool, device: torch.device
) -> int:
    """Both paths on Gaussian rows, the threshold put in the widest gap between cosines near `near`."""
    flags = {"causal": causal, "by_sequence": by_sequence}
    group, G = find_groups(
        layer.ids, layer.keys, layer.layout, layer.num_experts, 0, local=scheme.local or by_sequence,
        by_sequence=by_sequence, pairs=layer.pairs,
    )  # fmt: skip
    table, K = make_windows(group, G, layer.layout, scheme.window), layer.ids.shape[1]
    unit = torch.nn.functional.normalize(layer.x.double(), dim=1)
    tile = unit[table.clamp_min(0) // K]
    cosines = (tile @ tile.transpose(1, 2))[(table >= 0)[:, :, None] & (table >= 0)[:, None, :]]
    cosines = cosines[(cosines - near).abs() < 0.1].sort().values
    assert len(cosines) > 10, "too few pairs of copies near the threshold to test anything"
    wide = (cosines[1:] - cosines[:-1]).argmax()
    assert cosines[wide + 1] - cosines[wide] > 2 * ROUNDING, "no gap between cosines: take fewer copies"
    threshold = float(cosines[wide] + cosines[wide + 1]) / 2
    expected = layer.decide(scheme, threshold, kernel=False, **flags)
    got = layer.to(device).decide(scheme, threshold, kernel=True, **flags)
    copy = expected.copy.flatten()
    token, a, b = (t.flatten().cpu()[copy] // K for t in (torch.arange(copy.numel()), expected.leader, got.leader))
    problems = [_difference(name, getattr(expected, name), getattr(got, name)) for name in ("sent", "shared")]
    off = ((unit[token] * unit[a]).sum(1) - (unit[token] * unit[b]).sum(1)).abs()
    if scheme.nearest and (worst := float(off.nan_to_num(0.0).max())) > ROUNDING:
        problems.append(f"a representative is less alike than it could be, by {worst:.2e}")
    assert not any(problems), "\n".join([_name(layer, scheme, threshold, flags, device), *filter(None, problems)])
    return int((expected.copy & ~expected.sent).sum())


def _name(layer: AlikeLayer, scheme: Condensation, threshold: float, flags: dict, device: torch.device) -> str:
    return (
        f"fused and torch differ on {device}: x {tuple(layer.x.shape)} {layer.x.dtype}, ids {tuple(layer.ids.shape)}, "
        f"{layer.num_experts} experts on {layer.ep_size} ranks, pairs={layer.pairs}, {len(layer.lengths)} sequences, "
        f"threshold {threshold}, {flags}, {scheme}"
    )


def _difference(name: str, expected: Tensor, got: Tensor) -> str | None:
    """None, or how many elements differ and the first few of them."""
    got = got.cpu()
    if expected.shape != got.shape or expected.dtype != got.dtype:
        return f"  {name}: {tuple(expected.shape)} {expected.dtype} expected, {tuple(got.shape)} {got.dtype} found"
    wrong = (expected != got).nonzero()
    if not len(wrong):
        return None
    first = [f"{tuple(i.tolist())}: {expected[tuple(i)]} expected, {got[tuple(i)]} found" for i in wrong[:4]]
    return f"  {name}: {len(wrong)} of {expected.numel()} differ; " + "; ".join(first)
