"""Windows of rows to choose representatives in."""

import torch
from torch import Tensor


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
