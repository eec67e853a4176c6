"""Wire formats: how far a value may be off, what a row costs, and what becomes of values that are not finite."""

from dataclasses import astuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.comm import Comm, RowExchange, all_to_all_rows, build_mesh
from luffy.comm.meter import by_direction
from luffy.errors import UserError
from luffy.exchange.wire import Draws, Transport, WireCodecs, row_codec
from luffy.testing import run_ranks
from luffy.wire_format import BLOCK, FORMATS, WIRE_DIRECTIONS, WIRE_FORMATS, WireSpec, parse_wire, row_num_bytes

CODED = tuple(name for name in WIRE_FORMATS if name != "model")
INTEGERS = ("int16", "int8", "int4")


def expected_bytes(name: str, size: int) -> int:
    if name == "bf16":
        return 2 * size
    blocks = (size + 31) // 32
    return {"int4": 16 * blocks, "int16": 2 * size}.get(name, size) + 2 * blocks


def largest_error(name: str, x: np.ndarray) -> np.ndarray:
    """Bound for each value of one row [D], from the largest of its block of 32."""
    if name == "bf16":
        return np.abs(x) / 250 + 1e-38
    most = np.concatenate([np.full(len(b), np.abs(b).max()) for b in np.split(x, range(32, len(x), 32))])
    return most / {"int16": 65000, "int8": 250, "int4": 13}[name] + 57344 * 2.0**-120


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
    made = row_codec(name)
    coded = made.encode(rows)
    assert coded.dtype == torch.uint8 and coded.shape == (3, expected_bytes(name, size))
    assert row_num_bytes(name, size, dtype.itemsize) == coded.shape[1]
    back = made.decode(coded, size, dtype)
    assert back.dtype == dtype and back.shape == rows.shape
    # A single row, beside other columns of a message and behind an odd number of bytes.
    one = coded[1:2]
    for wide in (
        torch.cat([one.new_zeros(1, 3), one, one.new_zeros(1, 2)], dim=1)[:, 3:],
        torch.cat([one, one], dim=1),
    ):
        assert torch.equal(made.decode(wide[:, : one.shape[1]], size, dtype), back[1:2])
    rounding = 2.0**-8 if dtype == torch.bfloat16 else 2.0**-23
    for x, y in zip(rows.double().numpy(), back.double().numpy(), strict=True):
        assert (np.abs(x - y) <= largest_error(name, x) + rounding * np.abs(x)).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_zeros_and_no_rows(name):
    made = row_codec(name)
    assert not made.decode(made.encode(torch.zeros(2, 40)), 40, torch.float32).any()
    assert made.decode(made.encode(torch.zeros(0, 40)), 40, torch.float32).shape == (0, 40)


@pytest.mark.parametrize("name", CODED)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_arrives_as_not_finite_and_spares_other_blocks(name, bad):
    rows = torch.ones(2, 2 * BLOCK)
    rows[0, 3] = bad
    back = row_codec(name).decode(row_codec(name).encode(rows), 2 * BLOCK, torch.float32)
    assert not torch.isfinite(back[0, 3])
    assert torch.isfinite(back[0, BLOCK:]).all() and torch.isfinite(back[1]).all()


@pytest.mark.parametrize("name", INTEGERS)
def test_integers_of_the_grid_are_exact(name):
    """Multiples of a power-of-two scale, the largest among them, come back as they were."""
    most = {"int16": 32767, "int8": 127, "int4": 7}[name]
    rows = torch.randint(-most, most + 1, (5, 3 * BLOCK)).float()
    rows[:, ::BLOCK] = most
    made = row_codec(name)
    assert torch.equal(made.decode(made.encode(rows * 0.25), 3 * BLOCK, torch.float32), rows * 0.25)


@pytest.mark.parametrize("name", INTEGERS)
def test_the_largest_value_is_never_cut(name):
    """The scale is rounded up: what it stands for reaches as far as the block does."""
    rows = torch.rand(500, BLOCK, generator=torch.Generator().manual_seed(0)) + 1
    made = row_codec(name)
    back = made.decode(made.encode(rows), BLOCK, torch.float64)
    at = rows.argmax(1, keepdim=True)
    off = (back - rows).gather(1, at)
    assert (off.abs() <= rows.amax(1, keepdim=True) / {"int16": 65000, "int8": 250, "int4": 13}[name]).all()
    assert (off > 0).any()


def test_extreme_values_come_back_finite_and_in_place():
    largest = torch.finfo(torch.float32).max / 1.02  # a scale is rounded up by as much as a 128th
    rows = torch.tensor([[largest, -largest, 1.0, 0.0] * 8, [1e-30, -1e-30, 1e-38, 0.0] * 8, [1e-44] * 32])
    for name in INTEGERS:
        made = row_codec(name)
        back = made.decode(made.encode(rows), 32, torch.float32)
        assert torch.isfinite(back).all(), name
        torch.testing.assert_close(back[0, :2], rows[0, :2], rtol=0.13, atol=0)
        torch.testing.assert_close(back[1, :2], rows[1, :2], rtol=0.13, atol=0)
        assert not back[2].any()


@given(st.integers(1, 40), st.sampled_from([torch.float64, torch.float32, torch.bfloat16]), st.integers(0, 9))
@settings(deadline=None)
def test_rows_as_they_are_beside_coded_ones_come_back_as_they_were(size, dtype, other):
    for num_rows in (0, 1, 3):
        rows = torch.randn(num_rows, size).to(dtype)
        coded = row_codec("model").encode(rows)
        beside = torch.zeros(num_rows, other, dtype=torch.uint8)
        for message, start in ((torch.cat([coded, beside], dim=1), 0), (torch.cat([beside, coded], dim=1), other)):
            part = message[:, start : start + coded.shape[1]]
            assert torch.equal(row_codec("model").decode(part, size, dtype), rows)


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
                codecs=(WireCodecs(row_codec(there), row_codec(back)).plain, (None, None)),
            )  # fmt: skip
            got.backward(grads[rank])
            assert torch.equal(got, rounded(rows[1 - rank], there)), (there, back)
            assert torch.equal(mine.grad, rounded(grads[1 - rank], back)), (there, back)
            assert got_ids.tolist() == [1 - rank] * 3
            counted = by_direction(comm.meter.take())
            for direction, name in (("dispatch", there), ("dispatch_backward", back)):
                assert counted[direction] == 3 * (160 if name == "model" else expected_bytes(name, 40))
            _gathered_and_added(rank, comm, exchange, there, back)


def rounded(x: torch.Tensor, name: str) -> torch.Tensor:
    return row_codec(name).decode(row_codec(name).encode(x), x.shape[1], x.dtype)


def _gathered_and_added(rank: int, comm: Comm, exchange: RowExchange, there: str, back: str) -> None:
    """Gathering on the way out and adding on the way in are what doing so before and after would give."""
    wire = WireCodecs(row_codec(there), row_codec(back))
    index = torch.tensor([[4, 0, 4], [1, 1, 2]])
    x = torch.randn(2, 5, 40, generator=torch.Generator().manual_seed(20))
    up = torch.randn(2, 3, 40, generator=torch.Generator().manual_seed(21))
    mine = x[rank].clone().requires_grad_()
    (got,) = all_to_all_rows(
        [mine], exchange, directions=("dispatch",), backward_directions=("dispatch_backward",),
        codecs=(wire.gathering(index[rank], 5),),
    )  # fmt: skip
    got.backward(up[rank])
    assert torch.equal(got, rounded(x[1 - rank][index[1 - rank]], there))
    expected = torch.zeros(5, 40).index_add(0, index[rank], rounded(up[1 - rank], back))
    torch.testing.assert_close(mine.grad, expected, rtol=1e-6, atol=1e-6)

    mine = up[rank].clone().requires_grad_()
    (total,) = all_to_all_rows(
        [mine], exchange, directions=("combine",), backward_directions=("combine_backward",),
        codecs=(wire.adding(index[rank], 5),),
    )  # fmt: skip
    total.backward(x[rank])
    expected = torch.zeros(5, 40).index_add(0, index[rank], rounded(up[1 - rank], there))
    torch.testing.assert_close(total, expected, rtol=1e-6, atol=1e-6)
    assert torch.equal(mine.grad, rounded(x[1 - rank][index[1 - rank]], back))


def test_rows_and_gradients_cross_in_their_formats():
    run_ranks(exchange_job, 2)


def test_rows_that_stay_are_rounded_only_where_asked_and_alike():
    rows = torch.randn(3, 40, requires_grad=True)
    wire = WireCodecs(row_codec("int4"), row_codec("int8"))
    assert wire.staying(rows) is rows
    local = WireCodecs(row_codec("int4"), row_codec("int8"), local=True).staying(rows)
    assert torch.equal(local, rounded(rows.detach(), "int4"))
    up = torch.randn(3, 40)
    local.backward(up)
    assert torch.equal(rows.grad, rounded(up, "int8"))


def test_random_rounding_repeats_itself_and_differs_by_step_layer_rank_and_direction():
    spec = parse_wire("int4-sr")
    grads = torch.randn(4, 64)

    def coded(rank: int = 0, step: int = 3, micro: int = 1, layer: int = 2, way: str = "dispatch") -> bytes:
        draws = Draws(rank)
        draws.begin(step)
        transport = Transport(spec, draws, layer)
        made = [transport.codecs(way) for _ in range(micro)][-1]
        assert torch.equal(made.forward.encode(grads), row_codec("int4").encode(grads))  # rows go to the nearest
        return made.backward.encode(grads).numpy().tobytes()

    seen = [coded(), coded(rank=1), coded(step=4), coded(micro=2), coded(layer=3), coded(way="combine")]
    assert len(set(seen)) == len(seen)
    assert coded() == seen[0]


@given(st.integers(1, 4000), st.sampled_from([2, 4, 8]), st.sampled_from(CODED), st.sampled_from(CODED))
def test_prices_are_bytes_there_and_back(size, itemsize, there, back):
    rows = WireSpec(dispatch=there, combine_backward=back).row_bytes(size, itemsize)
    whole = itemsize * size
    assert astuple(rows) == (expected_bytes(there, size), whole, whole, expected_bytes(back, size))
    assert rows.mean == sum(astuple(rows)) / 4


def test_the_table_of_formats_says_what_codecs_do():
    """Each format of the table has a codec, which is off by no more than the table says and makes rows of its size."""
    rows = torch.randn(50, 96, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name, form in FORMATS.items():
        back = rounded(rows, name)
        most = rows.abs().unflatten(1, (-1, BLOCK)).amax(2, keepdim=True).expand(-1, -1, BLOCK).flatten(1)
        off = (back - rows).abs() / (most if form.blocks else rows.abs())
        assert off.max() <= form.error and (off.max() > form.error / 4 or name == "model"), name
        assert row_codec(name).encode(rows).shape[1] == form.row_num_bytes(96, 8)


def test_how_formats_are_named():
    assert parse_wire("model") == WireSpec()
    assert set(parse_wire("safe").formats.values()) == {"int8"}
    assert parse_wire("aggressive").dispatch == "int4"
    assert parse_wire("aggressive,local") == WireSpec("int4", "int8", "int4", "int8", local=True)
    assert parse_wire("combine=int4") == WireSpec(combine="int4")
    assert parse_wire("int4-sr") == WireSpec("int4", "int4", "int4-sr", "int4-sr")
    assert parse_wire("dispatch_backward=int8-sr,local") == WireSpec(dispatch_backward="int8-sr", local=True)
    wrong_ones = "int3;;dispatch;sideways=int8;dispatch=int8,dispatch=int4;dispatch=,;dispatch=int8-sr;bf16-sr;local"
    wrong_ones += ";fp8;fp8_e5m2;int8,residual=int16;int8,int4;int8,combine=int4;int8,locale"
    for wrong in wrong_ones.split(";"):
        with pytest.raises(UserError, match="--wire"):
            parse_wire(wrong)
    assert {*parse_wire("model").formats} == {*WIRE_DIRECTIONS}
