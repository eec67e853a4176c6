"""all_to_all_rows: bitwise for every dtype, several tensors at once, empty ranks, and its gradient."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from luffy.comm import Comm, RowExchange, all_to_all_rows, build_mesh
from luffy.comm.clock import PhaseClock, boundary
from luffy.comm.meter import by_direction
from luffy.testing import run_ranks

DTYPES = (
    torch.float64,
    torch.float32,
    torch.bfloat16,
    torch.float16,
    torch.int64,
    torch.int16,
    torch.uint8,
    torch.float8_e4m3fn,
)
# Rows from rank i to rank j. The second: rank 1 sends nothing and rank 2 receives nothing. The third: no row at all.
SPLITS = {
    1: [[[5]], [[0]]],
    2: [[[1, 3], [2, 0]], [[0, 0], [4, 0]], [[0, 0], [0, 0]]],
    4: [
        [[1, 2, 3, 4], [0, 5, 1, 0], [2, 2, 2, 2], [7, 0, 0, 1]],
        [[0, 3, 0, 1], [0, 0, 0, 0], [5, 1, 0, 2], [0, 4, 0, 0]],
        [[0] * 4] * 4,
    ],
}


def bits(rank: int, count: int, shape: tuple[int, ...], dtype: torch.dtype, seed: int) -> Tensor:
    """[count, *shape] of any bit pattern, so that NaNs, infinities and negative zeros are among them."""
    generator = torch.Generator().manual_seed(1000 * seed + rank)
    width = dtype.itemsize * int(np.prod(shape, dtype=np.int64))
    raw = torch.randint(0, 256, (count, width), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(count, *shape)


def raw_bytes(tensor: Tensor) -> bytes:
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes() if tensor.numel() else b""


def exchange_of(comm: Comm, splits: list[list[int]]) -> RowExchange:
    me = comm.mesh.ep_rank
    return RowExchange(comm, tuple(splits[me]), tuple(row[me] for row in splits))


def from_rank(tensor: Tensor, splits: list[list[int]], source: int, target: int) -> Tensor:
    """The part of `source`'s rows that goes to `target`."""
    start = sum(splits[source][:target])
    return tensor[start : start + splits[source][target]]


def round_trip_job(rank: int) -> None:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world = comm.mesh.world_size
    # Widths that leave the next tensor's columns misaligned.
    columns = [((3,), torch.uint8), ((), torch.int64), ((2, 2), torch.bfloat16), ((1,), torch.float64)]
    groups = [[((5,), dtype)] for dtype in DTYPES] + [[((), dtype)] for dtype in DTYPES] + [columns]
    for seed, splits in enumerate(SPLITS[world]):
        exchange = exchange_of(comm, splits)
        for group in groups:
            everyone = [[bits(r, sum(splits[r]), shape, dtype, seed) for shape, dtype in group] for r in range(world)]
            names = ["dispatch"] * len(group)
            comm.meter.take()
            moved = all_to_all_rows(everyone[rank], exchange, directions=names, backward_directions=names)
            row_bytes = sum(dtype.itemsize * int(np.prod(shape, dtype=np.int64)) for shape, dtype in group)
            away = sum(splits[rank]) - splits[rank][rank]
            assert by_direction(comm.meter.read())["dispatch"] == away * row_bytes
            for i, (shape, dtype) in enumerate(group):
                parts = [from_rank(everyone[r][i], splits, r, rank) for r in range(world)]
                assert moved[i].dtype == dtype and moved[i].shape == (sum(map(len, parts)), *shape)
                assert raw_bytes(moved[i]) == b"".join(map(raw_bytes, parts)), (dtype, splits)
            back = all_to_all_rows(moved, exchange.reversed(), directions=names, backward_directions=names)
            for sent, returned in zip(everyone[rank], back, strict=True):
                assert raw_bytes(sent) == raw_bytes(returned)


@pytest.mark.parametrize("world", [1, 2, 4])
def test_rows_arrive_bit_by_bit(world: int) -> None:
    run_ranks(round_trip_job, world)


def gradcheck_job(rank: int) -> None:
    comm = Comm.create(build_mesh(torch.device("cpu")))
    exchange = RowExchange(comm, (3,), (3,))
    names = ("dispatch", "combine")

    def move(*tensors: Tensor) -> tuple[Tensor, ...]:
        return tuple(all_to_all_rows(tensors, exchange, directions=names, backward_directions=names))

    x, y = (torch.randn(3, n, dtype=torch.float64, requires_grad=True) for n in (2, 1))
    assert torch.autograd.gradcheck(move, (x, y))
    clock = PhaseClock(comm.mesh.device)
    assert torch.autograd.gradcheck(lambda t: boundary(t, clock, "other", "experts"), (x,))


def test_gradcheck_on_one_rank() -> None:
    run_ranks(gradcheck_job, 1)


def global_gradcheck_job(rank: int, splits: list[list[int]]) -> None:
    """gradcheck of the *global* function: all ranks' rows as one input, all ranks' answers as one output.

    Each rank evaluates the whole function in step with the others: it takes its part of the common input, and an
    all-gather, whose derivative is written by hand, puts the common output together.
    """
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world, names = comm.mesh.world_size, ("dispatch", "control")
    exchange = exchange_of(comm, splits)
    sent = [sum(row) for row in splits]
    received = [sum(row[j] for row in splits) for j in range(world)]

    class Together(torch.autograd.Function):
        """[received[rank], n] of each rank -> [sum(received), n] on all of them."""

        @staticmethod
        def forward(ctx, part):
            wide = part.new_zeros(world, max(received), part.shape[1])
            wide[rank, : len(part)] = part
            return torch.cat([w[:n] for w, n in zip(comm.all_reduce(wide), received, strict=True)])

        @staticmethod
        def backward(ctx, grad):
            return grad.split(received)[rank]

    class Share(torch.autograd.Function):
        """[sum(sent), n] on all ranks -> [sent[rank], n]; the gradient of the common input is everyone's."""

        @staticmethod
        def forward(ctx, whole):
            return whole.split(sent)[rank].clone()

        @staticmethod
        def backward(ctx, grad):
            wide = grad.new_zeros(world, max(sent), grad.shape[1])
            wide[rank, : len(grad)] = grad
            return torch.cat([w[:n] for w, n in zip(comm.all_reduce(wide), sent, strict=True)])

    def function(x: Tensor, y: Tensor) -> tuple[Tensor, ...]:
        mine = [Share.apply(x), Share.apply(y)]
        moved = all_to_all_rows(mine, exchange, directions=names, backward_directions=names)
        # Squared, so that a gradient that reached the wrong row would be seen.
        return tuple(Together.apply(m**2) for m in moved)

    generator = torch.Generator().manual_seed(0)  # the same on all ranks
    x, y = (torch.randn(sum(sent), n, generator=generator, dtype=torch.float64) for n in (2, 1))
    assert torch.autograd.gradcheck(function, (x.requires_grad_(), y.requires_grad_()))


@pytest.mark.parametrize("splits", SPLITS[2][:2], ids=["uneven", "one-way"])
def test_gradcheck_on_two_ranks(splits: list[list[int]]) -> None:
    run_ranks(global_gradcheck_job, 2, splits)


def backward_job(rank: int) -> None:
    """Gradients go back where the rows came from; integers travel beside them without one."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    world = comm.mesh.world_size
    for splits in SPLITS[world]:
        exchange = exchange_of(comm, splits)
        n = sum(splits[rank])
        x = torch.arange(2.0 * n, dtype=torch.float64).reshape(n, 2).requires_grad_()
        ids = torch.full((n, 1), rank, dtype=torch.int16)
        comm.meter.take()
        moved, moved_ids = all_to_all_rows(
            [x, ids], exchange, directions=("dispatch", "control"), backward_directions=("dispatch_backward", "control")
        )
        assert not moved_ids.requires_grad
        assert moved_ids.flatten().tolist() == [r for r in range(world) for _ in range(splits[r][rank])]
        (moved * (rank + 1)).sum().backward()
        # Row sent to rank j was multiplied by j + 1 there.
        expected = [j + 1.0 for j in range(world) for _ in range(splits[rank][j])]
        assert x.grad is not None and x.grad[:, 0].tolist() == expected == x.grad[:, 1].tolist()
        counts = by_direction(comm.meter.read())
        into = sum(row[rank] for row in splits) - splits[rank][rank]
        assert counts["dispatch_backward"] == into * 16
        assert counts["control"] == (n - splits[rank][rank]) * 2


@pytest.mark.parametrize("world", [1, 2, 4])
def test_gradients_travel_back(world: int) -> None:
    run_ranks(backward_job, world)
