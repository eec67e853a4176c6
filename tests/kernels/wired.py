"""Rows to encode, gather, decode and add; run as a module, the kernels held to their references, to the bit."""

import itertools

import torch
from torch import Tensor

from luffy.kernels.wire_rows import LARGEST, add_rows, decode_rows, encode_rows

from .deciding import WHOLE, Share, share_of


def hard_rows(num_rows: int, size: int, dtype: torch.dtype, device: str = "cpu", seed: int = 0) -> Tensor:
    """Rows of very different sizes, with zeros, ties, tiny blocks, and some that are not finite."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(num_rows, size, generator=g, dtype=torch.float64)
    x *= 10.0 ** torch.randint(-6, 7, (num_rows, 1), generator=g)
    x[torch.rand(num_rows, size, generator=g) < 0.1] = 0
    x[0] = 0
    if num_rows > 5:
        x[1] = torch.randint(-14, 15, (size,), generator=g) / 2  # halves: ties where the scale is one
        x[1, ::32] = 7
        x[2] *= 1e-30
        x[3, size // 2] = torch.inf
        x[4, 0] = torch.nan
    return x.to(dtype).to(device)


def check(
    device: str, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], num_rows: int = 21, share: Share = WHOLE
) -> int:
    """Both operations, every format, gathered and not, at random and not; returns the cases seen.

    share: as for `deciding`.
    """
    seen = 0
    combinations = itertools.product(LARGEST, dtypes, sizes, (None, 2**31 - 7))
    for name, dtype, size, seed in itertools.islice(combinations, *share_of(share)):
        g = torch.Generator().manual_seed(size)
        x = hard_rows(num_rows, size, dtype, device)
        for index in (None, torch.randint(num_rows, (2 * num_rows,), generator=g).to(device)):
            expected = encode_rows(x, index, name, seed, kernel=False)
            got = encode_rows(x, index, name, seed, kernel=True)
            assert torch.equal(got, expected), (name, dtype, size, seed, index is None)
            # As a slice of a wider message, which starts at an odd byte.
            wide = torch.cat([got.new_zeros(len(got), 3), got, got.new_zeros(len(got), 2)], dim=1)[:, 3:-2]
            # Triton's interpreter cuts where the device, as torch does, rounds to nearest: bfloat16 is for the device.
            to = dtype if x.is_cuda else torch.float32
            back = decode_rows(wide, size, name, to, kernel=True)
            _assert_same(back, decode_rows(wide, size, name, to, kernel=False))
            at = torch.arange(len(got), device=device) // 2  # two rows a place, whose sum does not depend on order
            sums = [add_rows(torch.zeros(len(got), size, device=device), at, wide, name, k) for k in (True, False)]
            _assert_same(*sums)
            seen += 1
    return seen


def _assert_same(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


if __name__ == "__main__":
    # Both formats with a block that is cut, and rows of more blocks than one program looks at.
    seen = check("cpu", (torch.float32, torch.bfloat16), (50,), 6) + check("cpu", (torch.float32,), (1100,), 6)
    print(seen, "cases agree")
