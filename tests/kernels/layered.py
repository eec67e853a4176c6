"""The kernels of a MoE layer held to their references; run as a module, under Triton's interpreter."""

import itertools

import torch
from torch import Tensor

from luffy.kernels.activation import activate_weighted, activate_weighted_backward
from luffy.kernels.router import choose, choose_backward, split
from luffy.kernels.rows import add_up, pick
from luffy.kernels.sort import Pairs, sort_by_group

# R rows, K choices, E experts, share of choices that are dropped. More than a block of choices, and more groups than
# are looked at together, among them.
CASES = ((7, 2, 4, 0.0), (11, 4, 6, 0.3), (1, 1, 1, 0.0), (3, 3, 5, 1.0))
LARGE = ((300, 8, 37, 0.1), (600, 2, 16, 0.0))


def choices(R: int, K: int, E: int, drop: float, device: str = "cpu") -> Tensor:
    """Ids int64 [R, K], different ones in a row, some experts chosen much more often than others."""
    g = torch.Generator().manual_seed(R * E + K)
    score = torch.rand(R, E, generator=g) * torch.linspace(0.2, 1, E)
    ids = score.topk(K, dim=1).indices
    return ids.masked_fill(torch.rand(R, K, generator=g) < drop, -1).to(device)


def same_pairs(a: Pairs, b: Pairs) -> None:
    for name in ("flat", "row", "group", "place", "ends"):
        x, y = getattr(a, name), getattr(b, name)
        assert x.dtype == y.dtype == torch.int32 and torch.equal(x, y), (name, x, y)


def check_sort(device: str) -> int:
    """All experts here, and a share of them by a table; with the number of pairs known, and not."""
    seen = 0
    for R, K, E, drop in CASES + LARGE:
        ids = choices(R, K, E, drop, device)
        table = torch.randperm(E, generator=torch.Generator().manual_seed(E)).to(device)
        first, n = E // 3, E - E // 3
        here = int(((ids >= 0) & (table[ids.clamp_min(0)] >= first)).sum())
        for num, dtype in itertools.product((None, here), (torch.int64, torch.int16)):
            kwargs = {"num_pairs": num, "lookup": table, "first": first}
            got, want = (sort_by_group(ids.to(dtype), n, **kwargs, kernel=k) for k in (True, False))
            same_pairs(got, want)
            seen += 1
        same_pairs(*(sort_by_group(ids, E, kernel=k) for k in (True, False)))
    return seen


def check_rows(device: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], cases: tuple = CASES) -> int:
    seen = 0
    for (R, K, E, drop), dtype, D in itertools.product(cases, dtypes, sizes):
        ids = choices(R, K, E, drop, device)
        pairs = sort_by_group(ids, E, int((ids >= 0).sum()))
        g = torch.Generator().manual_seed(D)
        x, a, b = (torch.randn(R, D, generator=g).to(device, dtype) for _ in range(3))
        wide = torch.randn(R, D + 3, generator=g).to(device, dtype)[:, :D]  # rows that do not touch
        for source in (x, wide):
            assert torch.equal(pick(source, pairs.row, kernel=True), source[pairs.row])
        rows = torch.randn(len(pairs.row), D, generator=g).to(device, dtype)
        for addends in ((), (a,), (a, None), (a, b)):
            got, want = (add_up(rows, pairs.row, pairs.place, *addends, kernel=k) for k in (True, False))
            near(got, want)
            assert torch.equal(got, add_up(rows, pairs.row, pairs.place, *addends, kernel=True))
            seen += 1
    return seen


def check_activation(device: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], cases: tuple = CASES) -> int:
    seen = 0
    for (R, K, E, drop), dtype, F, name in itertools.product(cases, dtypes, sizes, ("swiglu", "gelu")):
        ids = choices(R, K, E, drop, device)
        width = 2 * F if name == "swiglu" else F
        g = torch.Generator().manual_seed(F)
        weights = torch.rand(R, K, generator=g).to(device)
        for trimmed, biased in itertools.product((True, False), (True, False)):
            pairs = sort_by_group(ids, E, int((ids >= 0).sum()) if trimmed else None)
            x = 3 * torch.randn(len(pairs.row), width, generator=g).to(device, dtype)
            up = torch.randn(len(pairs.row), F, generator=g).to(device, dtype)
            bias = torch.randn(E, width, generator=g).to(device) if biased else None
            arguments = (x, bias, weights, pairs, name)
            near(*(activate_weighted(*arguments, kernel=k) for k in (True, False)))
            pair = [activate_weighted_backward(up.clone(), x.clone(), *arguments[1:], kernel=k) for k in (True, False)]
            for got, want in zip(*pair, strict=True):
                near(got, want)
            assert not pair[0][2][ids < 0].any()
            seen += 1
    return seen


def check_router(device: str) -> int:
    """Choice and weights, and the gradient from any of a choice's members, against autograd in float64."""
    seen = 0
    for T, E, K in ((5, 6, 2), (9, 40, 8), (3, 1, 1)):
        g = torch.Generator().manual_seed(E)
        w = torch.randn(E, 7 * T, generator=g).to(device)
        parts = split(w).double()
        assert torch.equal(parts[1], parts[3]) and float((parts[:3].sum(0) - w).abs().max()) <= 2e-7
        pieces = torch.randn(T, 3 * E, generator=g).to(device)
        exact = pieces.double().unflatten(1, (3, E)).sum(1).requires_grad_()
        for score, normalize, biased in itertools.product(("softmax", "sigmoid"), (True, False), (True, False)):
            bias = torch.randn(E, generator=g).to(device) if biased else None
            got = choose(pieces, bias, K, score, normalize)
            scores = exact.softmax(-1) if score == "softmax" else exact.sigmoid()
            ids = (scores if bias is None else scores + bias).topk(K).indices
            assert torch.equal(got.ids, ids)
            weights = scores.gather(1, ids)
            weights = weights / weights.sum(-1, keepdim=True) if normalize else weights
            want = (exact, scores, weights)
            for a, b in zip((got.logits, got.scores, got.weights), want, strict=True):
                near(a, b.detach().float())
            for which in itertools.product((True, False), repeat=3):
                ups = [
                    torch.randn(w.shape, generator=g).to(device) if on else None
                    for w, on in zip(want, which, strict=True)
                ]
                if any(which):
                    outputs, given = zip(
                        *((w, u.double()) for w, u in zip(want, ups, strict=True) if u is not None), strict=True
                    )
                    (expected,) = torch.autograd.grad(outputs, exact, given, retain_graph=True)
                    found = choose_backward(got.scores, got.ids, *ups, score, normalize).float().unflatten(1, (3, E))
                    assert torch.equal(found[:, 0], found[:, 1])
                    off = float((found[:, 0] + found[:, 2] - expected).norm())
                    assert off <= 2e-4 * float(expected.norm() + 0.1), (off, score, normalize, which)
                    seen += 1
    return seen


def near(got: Tensor, want: Tensor) -> None:
    """Within roundings of their dtype, of the whole and of each value; the interpreter cuts where the device rounds."""
    assert got.dtype == want.dtype and torch.isfinite(got).all()
    tolerance, off = {torch.float32: 1e-5, torch.bfloat16: 1.5e-2}[got.dtype], (got.double() - want.double()).abs()
    assert float(off.norm()) <= 2 * tolerance * float(want.double().norm() + 1), (float(off.norm()), got.dtype)
    if got.numel():
        assert float(off.max()) <= tolerance * float(want.abs().max() + 1), (float(off.max()), got.dtype)


if __name__ == "__main__":
    both = (torch.float32, torch.bfloat16)
    print(check_sort("cpu"), check_rows("cpu", both, (24, 1100)), check_activation("cpu", both, (24, 300)))
    print(check_router("cpu"), "agree")
