"""The fused decision held to the torch one on many layers; run as a module, in Triton's interpreter."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator
from dataclasses import replace

import torch

import luffy.kernels.windows as windows
from luffy.condensation import parse_condense
from luffy.testing.alike import AlikeLayer, alike_layer, compare_blocks, compare_closely, compare_exactly

# (experts, choices a token, ranks, a row per pair)
ROUTINGS = [(8, 2, 2, False), (4, 1, 4, False), (40, 2, 8, False), (6, 3, 2, True), (8, 4, 4, False), (1, 1, 1, False)]
LENGTHS = [(30, 7, 1, 66, 12), (90,), (1,), (24, 24, 24, 24), (2, 1)]
THRESHOLDS = [0.5, 0.75, 1.0, 0.0, -1.0, 1.5]  # all but the last two are hit exactly by many pairs

Share = tuple[int, int]
WHOLE: Share = (0, 1)


def share_of(share: Share) -> tuple[int, None, int]:
    """Of `islice`: from the r-th, every n-th."""
    return share[0], None, share[1]


def _turns(
    dtypes: tuple[torch.dtype, ...],
    sizes: tuple[int, ...],
    widths: tuple[int, ...],
    lengths: list[tuple[int, ...]],
    share: Share,
) -> Iterator[tuple[int, int, float, Callable[[int], AlikeLayer], dict[str, bool]]]:
    """(number, window, threshold, a layer for each seed, flags) of every combination, the rest taking turns.

    share: (r, n) for every n-th combination from r on. Each wants kernels of its own, so n processes compile at once.
    """
    flags = itertools.product((True, False), (True, False), widths, dtypes)
    for seed, (causal, by_sequence, window, dtype) in itertools.islice(enumerate(flags), *share_of(share)):
        for i, of in enumerate(lengths):
            turn = seed + 3 * i
            E, K, N, pairs = ROUTINGS[turn % len(ROUTINGS)]
            shape = {"lengths": of, "size": sizes[turn % len(sizes)], "num_experts": E, "top_k": K, "ep_size": N}
            layer = functools.partial(alike_layer, **shape, dtype=dtype, pairs=pairs)
            yield (
                turn,
                window,
                THRESHOLDS[turn % len(THRESHOLDS)],
                layer,
                {"causal": causal, "by_sequence": by_sequence},
            )


def check(
    device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], widths: tuple[int, ...],
    lengths: list[tuple[int, ...]] = LENGTHS, share: Share = WHOLE,
) -> int:  # fmt: skip
    """Layers of every kind; returns how many copies were condensed, the same by both paths."""
    condensed = 0
    for turn, window, threshold, layer, flags in _turns(dtypes, sizes, widths, lengths, share):
        extras = f",window={window}" + (",local" if turn % 2 else "") + (",correct" if turn % 5 == 0 else "")
        scheme = parse_condense(f"static:0.1{extras}")
        assert scheme is not None
        scheme = replace(scheme, nearest=turn % 4 > 0)
        condensed += compare_exactly(layer(turn), scheme, threshold, **flags, device=device)
    return condensed


def check_rounding(
    device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], window: int, share: Share = WHOLE
) -> int:
    """Gaussian rows, where sums are rounded; returns how many copies were condensed."""
    condensed = 0
    scheme = parse_condense(f"static:0.8,local,window={window}")
    assert scheme is not None
    combinations = enumerate(itertools.product(dtypes, sizes, (True, False)))
    for seed, (dtype, size, causal) in itertools.islice(combinations, *share_of(share)):
        layer = alike_layer(seed, (60, 31), size, 8, 2, dtype=dtype, exact=False)
        condensed += compare_closely(layer, scheme, 0.8, causal=causal, by_sequence=False, device=device)
    return condensed


def check_many_blocks(device: torch.device) -> int:
    """More blocks of tokens than counts are looked at together."""
    whole, condensed = windows.BLOCK_TOKENS, 0
    windows.BLOCK_TOKENS = 2
    try:
        scheme = parse_condense("static:0.5,window=32")
        assert scheme is not None
        for by_sequence in (False, True):
            layer = alike_layer(5, (140, 3), 8, 4, 2)
            condensed += compare_exactly(layer, scheme, 0.5, causal=True, by_sequence=by_sequence, device=device)
    finally:
        windows.BLOCK_TOKENS = whole
    return condensed


def check_graphs(
    device: torch.device, dtypes: tuple[torch.dtype, ...], sizes: tuple[int, ...], widths: tuple[int, ...],
    lengths: list[tuple[int, ...]] = LENGTHS, share: Share = WHOLE,
) -> int:  # fmt: skip
    """The paper's graph over three blocks; between them some tokens come, some go, and routes change."""
    condensed = 0
    for turn, window, threshold, layer, flags in _turns(dtypes, sizes, widths, lengths, share):
        # The third block sees the tokens, rows and all, of the second, shifted: most are known, few in their place.
        second = layer(turn + 100)
        blocks = [layer(turn), second, replace(second, elsewhere=second.elsewhere - 3)]
        scheme = parse_condense("paper" + (f",window={window}" if window else ""))
        assert scheme is not None
        condensed += compare_blocks(blocks, scheme, threshold, **flags, device=device)
    return condensed


if __name__ == "__main__":
    cpu = torch.device("cpu")
    half = (torch.float32, torch.float16)  # the interpreter cannot multiply bfloat16
    # A third of the combinations, each value of each among them; a GPU takes all (tests/gpu/test_condense_cuda.py).
    found = [
        check(cpu, half, (24, 80), (16, 64), share=(1, 3)),
        check_rounding(cpu, half, (24, 200), 32),
        check_many_blocks(cpu),
        check_graphs(cpu, half, (24, 80), (0, 16), [*LENGTHS, (150,)], share=(0, 3)),
    ]
    print("condensed alike:", *found)
