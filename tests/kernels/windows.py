"""Windows of rows to choose representatives in; run as a module, the kernel held to its reference on many of them."""

import itertools

import torch
from torch import Tensor

from luffy.kernels.representatives import choose_representatives


def random_windows(seed: int, window: int, dtype: torch.dtype, size: int = 24, n: int = 90) -> tuple[Tensor, Tensor]:
    """Unit rows in clusters with exact twins, and ragged windows over them: full, single, empty, partly filled."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(8, size, generator=g)[torch.randint(8, (n,), generator=g)]
    x = x + 0.4 * torch.randn(n, size, generator=g) * torch.randint(0, 2, (n, 1), generator=g)
    x[0] = 0
    rows = torch.full((6, window), -1)
    for w, fill in enumerate((window, 1, 0, window // 2, window - 1, min(3, window))):
        rows[w, :fill] = torch.randint(n, (fill,), generator=g)
    return torch.nn.functional.normalize(x.to(dtype), dim=1), rows


def check(device: str, dtypes: tuple[torch.dtype, ...], windows: tuple[int, ...], sizes: tuple[int, ...]) -> int:
    """Compare kernel and reference; where rounding may decide, what is chosen must be as good. Returns windows seen."""
    seen = 0
    cases = itertools.product(dtypes, windows, sizes, (True, False), (True, False), (0.5, 0.9, 1.5))
    for seed, (dtype, window, size, causal, nearest, threshold) in enumerate(cases):
        unit, rows = (t.to(device) for t in random_windows(seed, window, dtype, size))
        tile = unit[rows.clamp_min(0)].double()
        similarity = tile @ tile.transpose(1, 2)
        close = 2e-2 if dtype == torch.bfloat16 else 2e-5
        if ((similarity - threshold).abs() < close).any():
            threshold += 3 * close if threshold < 1 else 0
            if ((similarity - threshold).abs() < close).any():
                continue
        # bfloat16 products are exact in float32 and only their sum rounds: the same rows in float32 are the reference.
        expected = choose_representatives(unit.float(), rows, threshold, causal=causal, nearest=nearest, kernel=False)
        got = choose_representatives(unit, rows, threshold, causal=causal, nearest=nearest, kernel=True)
        if nearest:
            own = torch.arange(window, device=device)
            assert ((got == own) == (expected == own)).all(), (dtype, window, size, causal, threshold)
            index = rows >= 0
            a, b = (similarity.gather(1, t[:, None, :]).squeeze(1)[index] for t in (got, expected))
            torch.testing.assert_close(a, b, atol=close, rtol=0)
        else:
            assert torch.equal(got, expected), (dtype, window, size, causal, threshold)
        seen += len(rows)
    return seen


if __name__ == "__main__":
    print(check("cpu", (torch.float32,), (16, 32), (8, 80)), "windows agree")
