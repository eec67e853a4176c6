"""Seats: balanced, where rows are, the same for the same sequences, and as read where nothing is known."""

import numpy as np
import pytest

from luffy.data.loader import Sequence
from luffy.plan.cost import AttentionCost
from luffy.plan.synthetic import synthetic_counts
from luffy.plan.topology import Topology
from luffy.seats.layout import Seating, SeatLayout, as_read
from luffy.seats.predictor import RowPredictor
from luffy.seats.seater import SLACK, AsRead, LearntSeats, seat_by_rows

LAYOUTS = [
    SeatLayout(4),
    SeatLayout(8, num_micro_batches=4),
    SeatLayout(4, dp_size=2, num_micro_batches=2, topology=Topology(4, 2, 8e9, 1e9)),
    SeatLayout(2, dp_size=4, padded=True),
    SeatLayout(1, dp_size=2),
]


def case(layout: SeatLayout, seed: int, uneven: bool, num: int = 96) -> tuple[np.ndarray, np.ndarray]:
    """Rows [B, N] and lengths [B]."""
    rows, lengths = synthetic_counts(num, layout.ep_size, seed=seed, length=512), np.full(num, 512)
    if uneven:
        lengths = np.clip(np.random.default_rng(seed).lognormal(5.0, 0.7, num), 4, 1024).astype(np.int64)
    return rows * lengths[:, None] // 512, lengths


def loads(seating: Seating, lengths: np.ndarray, layout: SeatLayout) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sequences, tokens and attention operations by world rank and micro-batch, counted one by one."""
    shape = (layout.world_size, layout.num_micro_batches)
    counts, tokens, flops = (np.zeros(shape, dtype=np.int64) for _ in range(3))
    for rank in range(layout.world_size):
        for micro in range(layout.num_micro_batches):
            here = lengths[seating.of(rank, micro)]
            counts[rank, micro], tokens[rank, micro] = len(here), here.sum()
            if layout.padded and len(here):
                flops[rank, micro] = layout.attention.padded_flops(len(here), here.max())
            elif len(here):
                flops[rank, micro] = layout.attention.sequence_flops(here).sum()
    return counts, tokens, flops


def left(rows: np.ndarray, seating: Seating, layout: SeatLayout) -> int:
    """Rows that leave their rank."""
    return int(rows.sum() - rows[np.arange(len(rows)), seating.ep_rank(layout)].sum())


def busiest(rows: np.ndarray, seating: Seating, layout: SeatLayout) -> int:
    """Of each cell, the larger of the rows in and out of its busiest rank; summed over cells."""
    total, ranks, cells = 0, seating.ep_rank(layout), seating.cell(layout)
    for cell in range(layout.num_cells):
        between = np.zeros((layout.ep_size, layout.ep_size), dtype=np.int64)
        np.add.at(between, ranks[cells == cell], rows[cells == cell])
        np.fill_diagonal(between, 0)
        total += max(between.sum(0).max(), between.sum(1).max())
    return total


def test_as_read_is_how_the_loader_deals():
    layout = SeatLayout(2, dp_size=2, num_micro_batches=3)
    seating = as_read(24, layout)
    # Micro-batch m of a step is the loader's batch m of it: of 8, and a rank reads 2.
    assert seating.micro_batch.tolist() == [0] * 8 + [1] * 8 + [2] * 8
    assert seating.rank.tolist() == [0, 0, 1, 1, 2, 2, 3, 3] * 3
    assert seating.of(1, 2).tolist() == [18, 19]
    assert seating.ep_rank(layout).tolist() == [0, 0, 1, 1] * 6
    with pytest.raises(ValueError, match="do not divide"):
        as_read(25, layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("uneven", [False, True])
def test_seats_hold_what_they_may_and_keep_rows_at_home(layout: SeatLayout, uneven: bool):
    for seed in range(6):
        rows, lengths = case(layout, seed, uneven)
        read = as_read(len(lengths), layout)
        seating = seat_by_rows(rows, lengths, layout, read)
        assert seating.rank.dtype == seating.micro_batch.dtype == np.int64
        counts, tokens, flops = loads(seating, lengths, layout)
        assert counts.sum() == len(lengths)
        _, tokens_read, flops_read = loads(read, lengths, layout)
        assert tokens.max() <= max(tokens_read.max(), (1 + SLACK) * tokens.mean())
        assert flops.max() <= max(flops_read.max(), (1 + SLACK) * flops_read.mean())
        if not uneven:
            assert (counts == counts[0, 0]).all()
        assert left(rows, seating, layout) <= left(rows, read, layout)
        if layout.ep_size > 1 and not layout.padded:  # padding may leave no seats but those as read
            assert left(rows, seating, layout) < 0.9 * left(rows, read, layout)
            assert busiest(rows, seating, layout) < busiest(rows, read, layout)
        again = seat_by_rows(rows.copy(), lengths.copy(), layout, read)
        np.testing.assert_array_equal(again.rank, seating.rank)
        np.testing.assert_array_equal(again.micro_batch, seating.micro_batch)


def test_uneven_sequences_end_up_more_level_than_they_were_read():
    layout = SeatLayout(8, num_micro_batches=4)
    rows, lengths = case(layout, 0, uneven=True, num=512)
    read = as_read(512, layout)
    seated = loads(seat_by_rows(rows, lengths, layout, read), lengths, layout)
    for now, then in zip(seated[1:], loads(read, lengths, layout)[1:], strict=True):
        assert now.max() < 0.9 * then.max()
        assert now.max() < 1.2 * now.mean()


def test_every_micro_batch_gets_its_share_of_what_each_rank_receives():
    """Two kinds of sequences, whose rows go to one rank or the other: a micro-batch of one kind would crowd it."""
    layout = SeatLayout(4, num_micro_batches=4)
    rows = np.full((64, 4), 100)
    kind = np.repeat([0, 1], 32)
    rows[np.arange(64), kind] = 400
    read = as_read(64, layout)
    seating = seat_by_rows(rows, np.full(64, 512), layout, read)
    for micro in range(4):
        assert np.bincount(kind[seating.micro_batch == micro]).max() <= 9  # of 16; 16 as read
    assert busiest(rows, seating, layout) < 0.9 * busiest(rows, read, layout)


def test_who_has_nothing_to_gain_stays():
    layout = SeatLayout(4)
    read = as_read(32, layout)
    rows = np.full((32, 4), 10)
    assert (seat_by_rows(rows, np.full(32, 64), layout, read).rank == read.rank).all()
    rows[np.arange(32), read.rank] = 90
    assert (seat_by_rows(rows, np.full(32, 64), layout, read).rank == read.rank).all()
    nobody = seat_by_rows(np.zeros((0, 4), dtype=np.int64), np.zeros(0, dtype=np.int64), layout, as_read(0, layout))
    assert nobody.rank.shape == (0,)


def sequences(num: int) -> tuple[list[Sequence], np.ndarray]:
    """Of four kinds, in token ids of their own, and their kinds."""
    rng = np.random.default_rng(0)
    kinds = rng.permutation(np.arange(num) % 4)
    tokens = [rng.integers(100 * k, 100 * k + 100, 32) for k in kinds]
    return [Sequence(i, t, t, True) for i, t in enumerate(tokens)], kinds


def test_learnt_seats_are_as_read_until_fitted_and_then_follow_the_kind():
    layout, (batch, kinds) = SeatLayout(4, num_micro_batches=2), sequences(64)
    seats = LearntSeats(4)
    read = AsRead().seat(batch, layout)
    found = seats.seat(batch, layout)
    assert (found.rank == read.rank).all() and (found.micro_batch == read.micro_batch).all()

    lengths = np.full(64, 32)
    rows = np.where(np.arange(4) == kinds[:, None], 60, 10)
    seats.predictor.observe(seats.describe([s.tokens for s in batch]), lengths, rows)
    assert seats.predictor.solve()
    found = seats.seat(batch, layout)
    assert (found.rank == kinds).mean() > 0.95
    # Whoever loads its state seats alike; at another number of ranks it is of no use.
    other, fewer = LearntSeats(4), LearntSeats(2)
    other.load(seats.state())
    np.testing.assert_array_equal(other.seat(batch, layout).rank, found.rank)
    fewer.load(seats.state())
    assert not fewer.is_fitted
    assert AsRead().state() == {}


def test_a_prediction_that_crowds_a_rank_is_not_followed():
    """All rows at one rank: whoever sits there spares the same, but the busiest rank may not get busier."""
    layout, read = SeatLayout(2), as_read(8, SeatLayout(2))
    predictor = RowPredictor(2)
    assert predictor.coefficients is None
    rows = np.stack([np.zeros(8, dtype=np.int64), np.arange(8) + 1], axis=1)
    seating = seat_by_rows(rows, np.full(8, 16), layout, read)
    assert busiest(rows, seating, layout) <= busiest(rows, read, layout)
    assert AttentionCost().hidden_size == layout.attention.hidden_size
