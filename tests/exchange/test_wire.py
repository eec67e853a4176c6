"""Wire formats: how far a value may be off, what a row costs, and what becomes of values that are not finite."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.comm import Comm, RowExchange, all_to_all_rows, build_mesh
from luffy.comm.meter import by_direction
from luffy.errors import UserError
from luffy.exchange.wire import BLOCK, Blocks, codec
from luffy.recipes import WIRE_DIRECTIONS, parse_wire
from luffy.testing import run_ranks

BITS = {"int8": 8, "int4": 4, "fp8": 8}
CODED = ("bf16", *BITS)


def expected_bytes(name: str, size: int) -> int:
    if name == "bf16":
        return 2 * size
    blocks = (size + 31) // 32
    return (16 * blocks if name == "int4" else size) + 2 * blocks


def largest_error(name: str, x: np.ndarray) -> np.ndarray:
    """Bound for each value of one row [D], from the largest of its block of 32."""
    if name == "bf16":
        return np.abs(x) / 250 + 1e-38
    most = np.concatenate([np.full(len(b), np.abs(b).max()) for b in np.split(x, range(32, len(x), 32))])
    tiny = 448 * 2.0**-120
    if name == "fp8":
        return np.abs(x) / 15 + most / 4e5 + tiny
    return most / {"int8": 250, "int4": 13}[name] + tiny


@given(
    st.sampled_from(CODED),
    st.integers(1, 100),
    st.integers(0, 10**6),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    st.floats(-37, 30),
)
@settings(max_examples=150, deadline=None)
def test_a_value_comes_back_within_its_formats_error(name, size, seed, dtype, magnitude):
    rng = np.random.default_rng(seed)
    rows = rng.standard_normal((3, size)) * 10.0 ** (magnitude + rng.integers(-3, 4, (3, size)))
    rows[rng.random((3, size)) < 0.1] = 0
    rows = torch.from_numpy(rows).to(dtype)
    made = codec(name)
    coded = made.encode(rows)
    assert coded.dtype == torch.uint8 and coded.shape == (3, expected_bytes(name, size))
    assert made.row_num_bytes(size) == coded.shape[1]
    back = made.decode(coded, size, dtype)
    assert back.dtype == dtype and back.shape == rows.shape
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    for x, y in zip(rows.double().numpy(), back.double().numpy(), strict=True):
        assert (np.abs(x - y) <= largest_error(name, x) + rounding * np.abs(x)).all()


@pytest.mark.parametrize("name", BITS)
def test_zeros_and_no_rows(name):
    made = codec(name)
    assert not made.decode(made.encode(torch.zeros(2, 40)), 40, torch.float32).any()
    assert made.decode(made.encode(torch.zeros(0, 40)), 40, torch.float32).shape == (0, 40)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_not_finite_and_spares_other_blocks(name, bad):
    rows = torch.ones(2, 2 * BLOCK)
    rows[0, 3] = bad
    back = codec(name).decode(codec(name).encode(rows), 2 * BLOCK, torch.float32)
    assert not torch.isfinite(back[0, 3])
    assert torch.isfinite(back[0, BLOCK:]).all() and torch.isfinite(back[1]).all()


@pytest.mark.parametrize("name", ["int8", "int4"])
def test_integers_of_the_grid_are_exact(name):
    """Multiples of a power-of-two scale, the largest among them, come back as they were."""
    most = {"int8": 127, "int4": 7}[name]
    rows = torch.randint(-most, most + 1, (5, 3 * BLOCK)).float()
    rows[:, ::BLOCK] = most
    assert torch.equal(Blocks(name).decode(Blocks(name).encode(rows * 0.25), 3 * BLOCK, torch.float32), rows * 0.25)


def exchange_job(rank: int) -> None:
    """Each rank sends 3 rows to the other; values, gradients and bytes follow the two formats."""
    comm = Comm.create(build_mesh(torch.device("cpu")))
    splits = tuple(0 if r == rank else 3 for r in range(2))
    exchange = RowExchange(comm, splits, splits)
    rows = [torch.randn(3, 40, generator=torch.Generator().manual_seed(r)) for r in range(2)]
    grads = [torch.randn(3, 40, generator=torch.Generator().manual_seed(10 + r)) for r in range(2)]
    for there in ("model", *CODED):
        for back in ("model", *CODED):
            mine = rows[rank].clone().requires_grad_()
            comm.meter.take()
            ids = torch.full((3,), rank)
            got, got_ids = all_to_all_rows(
                [mine, ids], exchange, directions=("dispatch", "control"),
                backward_directions=("dispatch_backward", "control"),
                codecs=((codec(there), codec(back)), (None, None)),
            )  # fmt: skip
            got.backward(grads[rank])

            def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
                return x if name == "model" else codec(name).decode(codec(name).encode(x), 40, x.dtype)

            assert torch.equal(got, rounded(rows[1 - rank], there)), (there, back)
            assert torch.equal(mine.grad, rounded(grads[1 - rank], back)), (there, back)
            assert got_ids.tolist() == [1 - rank] * 3
            counted = by_direction(comm.meter.take())
            for direction, name in (("dispatch", there), ("dispatch_backward", back)):
                assert counted[direction] == 3 * (160 if name == "model" else expected_bytes(name, 40))


def test_rows_and_gradients_cross_in_their_formats():
    run_ranks(exchange_job, 2)


def test_how_formats_are_named():
    assert parse_wire("model") == dict.fromkeys(WIRE_DIRECTIONS, "model")
    assert set(parse_wire("safe").values()) == {"int8"}
    assert parse_wire("aggressive")["dispatch"] == "int4"
    assert parse_wire("combine=int4") == dict.fromkeys(WIRE_DIRECTIONS, "model") | {"combine": "int4"}
    for wrong in ("int3", "", "dispatch", "sideways=int8", "dispatch=int8,dispatch=int4", "dispatch=,"):
        with pytest.raises(UserError, match="--wire"):
            parse_wire(wrong)
