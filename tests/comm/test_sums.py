"""Sums of gradients over ranks: exact, in bfloat16 and in coded blocks, the same bits on all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from luffy.comm import Comm, RowExchange, all_to_all_rows, build_mesh
from luffy.comm.meter import by_direction
from luffy.comm.sums import GradientSums
from luffy.testing import run_ranks
from luffy.wire_format import BLOCK, SUM_FORMATS, row_num_bytes

SIZES = (1, 31, 33, 1024, 4 * 1024, 5000)  # within a block, a row, rows for all, and what fills none
DTYPES = (torch.float32, torch.float64, torch.bfloat16)


def part(rank: int, size: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Gradients of very different sizes, a stretch of zeros among them."""
    generator = torch.Generator().manual_seed(100 * seed + rank)
    values = torch.randn(size, generator=generator) * 10.0 ** torch.randint(-6, 3, (size,), generator=generator)
    values[size // 3 : size // 2] = 0
    return values.to(dtype)


def largest_of_blocks(flat: Tensor) -> Tensor:
    """The largest |x| of the block of each value, [n] -> [n]."""
    padded = torch.nn.functional.pad(flat.abs(), (0, -len(flat) % BLOCK)).view(-1, BLOCK)
    return padded.amax(1, keepdim=True).expand(-1, BLOCK).flatten()[: len(flat)]


def check(got: Tensor, parts: list[Tensor], form: str) -> None:
    exact = torch.stack([p.double() for p in parts]).sum(0)
    size = torch.stack([p.double().abs() for p in parts]).sum(0)
    rounding = {torch.float64: 1e-15, torch.float32: 1e-6, torch.bfloat16: 2.0**-8}[got.dtype]
    slack = len(parts) * rounding * size + 1e-30
    if form == "bfloat16":
        slack = slack + len(parts) * 2.0**-8 * size
    if form == "int8":
        terms = torch.stack([largest_of_blocks(p.double()) for p in parts]).sum(0) / 250
        # The sum that is coded has the error of its terms, and can be larger by it.
        slack = slack + terms + (largest_of_blocks(exact) + largest_of_blocks(terms)) / 250 + rounding * exact.abs()
    assert ((got.double() - exact).abs() <= slack).all(), (form, got.dtype, len(got))
    assert not got[len(got) // 3 : len(got) // 2].any()  # zeros stay zeros


def _sums(rank: int, ep_size: int) -> tuple[list[bytes], dict[str, list[int]]]:
    mesh = build_mesh(torch.device("cpu"), ep_size)
    comm = Comm.create(mesh)
    out, num_bytes = [], {}
    for group, ranks in ((mesh.world_group, list(range(mesh.world_size))), (mesh.dp_group, mesh.dp_ranks)):
        for form in SUM_FORMATS:
            sums = GradientSums(comm, group, ranks, form)
            for dtype in DTYPES:
                comm.meter.take()
                tensors = [part(rank, size, dtype, seed) for seed, size in enumerate(SIZES)]
                pending = [sums.start(t) for t in tensors]  # all under way at once, and rows besides
                rows = torch.full((2 * mesh.ep_size, 3), float(rank))
                splits = (2,) * mesh.ep_size
                (moved,) = all_to_all_rows(
                    [rows], RowExchange(comm, splits, splits), directions=("dispatch",), backward_directions=("",)
                )
                assert moved[:, 0].tolist() == [float(r) for r in mesh.ep_ranks for _ in range(2)]
                for seed, (size, tensor, future) in enumerate(zip(SIZES, tensors, pending, strict=True)):
                    got = future.wait()
                    assert got.data_ptr() == tensor.data_ptr()
                    check(got, [part(r, size, dtype, seed) for r in ranks], form)
                    out.append(got.view(torch.uint8).numpy().tobytes())
                num_bytes[f"{len(ranks)} {form} {dtype}"] = by_direction(comm.meter.read())["gradients"]
    return out, num_bytes


@pytest.mark.parametrize(("world", "ep_size"), [(2, 2), (4, 4), (4, 2)])
def test_sums_are_right_within_their_format_and_the_same_on_all_ranks(world: int, ep_size: int) -> None:
    found = run_ranks(_sums, world, ep_size)
    everywhere = len(SUM_FORMATS) * len(DTYPES) * len(SIZES)
    assert all(out[:everywhere] == found[0][0][:everywhere] for out, _ in found)
    for rank, (out, num_bytes) in enumerate(found):
        assert out[everywhere:] == found[rank % ep_size][0][everywhere:]  # over the copies of an EP group
        rows = sum(-(-size // (1024 * world)) for size in SIZES)  # of each rank's part
        assert num_bytes[f"{world} int8 torch.float32"] == 2 * (world - 1) * rows * row_num_bytes("int8", 1024, 4)
        plain = sum(2 * (world - 1) * 4 * size // world for size in SIZES)
        assert num_bytes[f"{world} model torch.float32"] == plain
        assert num_bytes[f"{world} bfloat16 torch.float64"] == sum(2 * (world - 1) * 2 * s // world for s in SIZES)


def _not_a_number(rank: int) -> bool:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    sums = GradientSums(comm, comm.mesh.world_group, range(comm.mesh.world_size), "int8")
    for bad in (float("nan"), float("inf")):
        tensor = torch.ones(3 * BLOCK)
        if rank == 1:
            tensor[BLOCK + 3] = bad
        got = sums.start(tensor).wait()
        assert torch.isfinite(got[:BLOCK]).all() and torch.isfinite(got[2 * BLOCK :]).all()
        assert not torch.isfinite(got[BLOCK + 3])
    return True


def test_what_is_no_number_on_one_rank_is_none_on_all() -> None:
    assert run_ranks(_not_a_number, 2) == [True, True]


def _one_fails(rank: int) -> None:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    sums = GradientSums(comm, comm.mesh.world_group, range(comm.mesh.world_size), "int8")
    if rank == 0:
        sums.start(torch.ones(10))  # nobody answers
        raise RuntimeError("rank 0 gave up")
    torch.distributed.barrier()


def test_a_rank_can_end_while_a_sum_is_under_way() -> None:
    with pytest.raises(Exception, match="rank 0 gave up"):
        run_ranks(_one_fails, 2)


class _FailedWork:
    def get_future(self) -> torch.futures.Future[list[Tensor]]:
        future: torch.futures.Future[list[Tensor]] = torch.futures.Future()
        future.set_exception(RuntimeError("peer is gone"))
        return future


def _failing(rank: int) -> bool:
    """A sum that failed must never pass for one that was made."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    for form in SUM_FORMATS:
        sums = GradientSums(comm, comm.mesh.world_group, range(comm.mesh.world_size), form)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("luffy.comm.sums.dist.all_reduce", lambda *_, **__: _FailedWork())
            patch.setattr(sums, "_sum", lambda *_: _FailedWork().get_future().value())
            with pytest.raises(RuntimeError, match="peer is gone"):
                sums.start(torch.ones(10)).wait()
    return True


def test_a_sum_that_failed_raises_in_every_format() -> None:
    assert run_ranks(_failing, 2) == [True, True]


def test_an_unknown_format_is_refused() -> None:
    with pytest.raises(ValueError, match="no format 'int2' of sums: one of model, bfloat16, int8"):
        GradientSums(None, None, [0], "int2")  # type: ignore[arg-type]
