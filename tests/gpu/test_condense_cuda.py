"""The fused decision what to condense, on a GPU: the torch path's answers, in few launches and linear memory.

The parent process never touches CUDA, so that ranks can be forked; one rank does it all.
"""

from __future__ import annotations

import os

import pytest
import torch

from luffy.condensation import parse_condense
from luffy.exchange.condense import only_sent
from luffy.testing import run_ranks, run_together
from luffy.testing.alike import alike_layer, compare_exactly
from luffy.testing.launches import launches

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not os.path.exists("/dev/nvidia0") and not os.path.exists("/dev/dxg"), reason="no GPU"),
]
FORMATS = (torch.bfloat16, torch.float32, torch.float16)


def _gpu() -> torch.device:
    torch.cuda.set_device(0)
    return torch.device("cuda", 0)


def _small(rank: int, world: int) -> list[int]:
    """This rank's share: nearly all of it is compiling, which several processes do at once."""
    from tests.kernels.deciding import LENGTHS, check, check_graphs, check_many_blocks, check_rounding

    gpu, share = _gpu(), (rank, world)
    return [
        check(gpu, FORMATS, (24, 80, 768), (16, 32, 64, 128), share=share),
        check_rounding(gpu, FORMATS, (24, 768, 4096), 64, share=share),
        check_many_blocks(gpu) if rank == 0 else 0,
        check_graphs(gpu, FORMATS[:2], (24, 80, 768), (0, 64), [*LENGTHS[:2], (700, 90)], share=share),
    ]


def test_the_kernels_decide_as_torch_does():
    world = min(8, os.cpu_count() or 1)
    condensed = [sum(parts) for parts in zip(*run_ranks(_small, world, world), strict=True)]
    assert [n > least for n, least in zip(condensed, (2000, 300, 30, 20_000), strict=True)] == [True] * 4, condensed


def _large(rank: int) -> int:
    condensed = 0
    for size, by_sequence, causal in ((768, False, True), (4096, True, True), (2048, False, False)):
        lengths = (5000, 1024, 1, 333, 4096, 2048, 77)  # more blocks of tokens than counts are looked at together
        layer = alike_layer(size, lengths, size, 16, 2, dtype=torch.bfloat16)
        scheme = parse_condense("static:0.5,local,window=128")
        assert scheme is not None
        condensed += compare_exactly(layer, scheme, 0.5, causal=causal, by_sequence=by_sequence, device=_gpu())
    return condensed


def test_a_layer_of_thousands_of_rows(outcomes):
    assert outcomes["large"].get()[0] > 500


def _cost(rank: int) -> dict[str, tuple[dict[str, tuple[int, float]], int]]:
    """By scheme: what is launched for a decision of 16384 copies, and the bytes that it holds at most."""
    gpu, found = _gpu(), {}
    layer = alike_layer(1, (1024,) * 8, 1024, 16, 2, dtype=torch.bfloat16).to(gpu)
    for text in ("static:0.9", "static:0.9,correct", "static:0.9,correct,window=64"):
        for by_sequence in (False, True):
            scheme = parse_condense(text)
            assert scheme is not None

            def decide(scheme=scheme, by_sequence=by_sequence):
                answer = layer.decide(scheme, 0.5, causal=True, by_sequence=by_sequence, kernel=None)
                return only_sent(layer.keys, answer)

            decide()
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            decide()
            memory = torch.cuda.max_memory_allocated() - before
            found[f"{text} by_sequence={by_sequence}"] = (launches(decide), memory)
    return found


def _graph(rank: int) -> list[tuple[int, int, int]]:
    """Of sequences apart and all together: bytes that a decision over the paper's graph holds at most, those that it
    may (K copies a token, each with as many others as there can be, a byte a pair), and its launches."""
    gpu, found, scheme = _gpu(), [], parse_condense("paper")
    assert scheme is not None
    layer = alike_layer(1, (512,) * 12, 768, 16, 2, dtype=torch.bfloat16).to(gpu)
    for by_sequence, longest in ((True, 512), (False, 12 * 512)):
        flags = {"causal": True, "by_sequence": by_sequence, "kernel": None}
        before = layer.decide_after(None, scheme, 0.5, **flags)[1]
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()

        def decide(before=before, flags=flags):
            return layer.decide_after(before, scheme, 0.5, **flags)

        decide()
        memory = torch.cuda.max_memory_allocated() - held
        found.append((memory, 12 * 512 * 2 * (longest + 300), sum(count for count, _ in launches(decide).values())))
    return found


def test_a_graph_holds_a_byte_for_each_pair_that_can_meet(outcomes):
    for memory, most, count in outcomes["graph"].get()[0]:
        assert memory < most and 0 < count < 50, (memory, most, count)


@pytest.fixture(scope="module")
def outcomes():
    return run_together({"large": (_large,), "cost": (_cost,), "graph": (_graph,)}, 1, case_seconds=300)


def test_a_decision_is_a_handful_of_launches_and_little_memory(outcomes):
    for scheme, (found, memory) in outcomes["cost"].get()[0].items():
        assert found, "the profiler sees no kernels on this machine: launches cannot be counted"
        assert sum(count for count, _ in found.values()) <= 8, (scheme, found)
        assert memory < 16384 * 80, (scheme, memory)  # rows of 1024 bfloat16 would be 2048 bytes each
