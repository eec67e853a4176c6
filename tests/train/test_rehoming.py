"""Re-homing on real ranks: experts move where it pays, and seats are learnt from the same recordings, by all alike."""

import numpy as np
import pytest
import torch

from luffy.data.loader import Sequence
from luffy.model.casting import keep_over_micro_batches
from luffy.plan.replay import rows_of_all_layers
from luffy.plan.trace import TraceStep
from luffy.seats.predictor import RowPredictor
from luffy.seats.seater import LearntSeats
from luffy.testing import run_ranks
from luffy.train.batching import gather_step, make_micro_batch
from luffy.train.rehoming import (
    current_owners,
    is_due,
    learn_seats,
    move_experts,
    num_recorded,
    rehome,
    steps_until_next,
)
from tests.model.cases import Case, build, run_step, share_of, shrunk

CASE = Case(shrunk("moe-llm-tiny"), 4, recipe="luffy", dtype=torch.float32)


def test_when_experts_are_re_homed():
    assert [s for s in range(1001) if is_due(s, 250)] == [31, 62, 125, 250, 500, 750, 1000]
    assert [s for s in range(20) if is_due(s, 4)] == [1, 2, 4, 8, 12, 16]
    assert not any(is_due(s, 0) for s in range(20))
    assert [steps_until_next(s, 250, 700) for s in (31, 125, 250, 500)] == [31, 125, 250, 200]
    assert (num_recorded(64, 16), num_recorded(64, 64), num_recorded(8, 64)) == (4, 6, 6)


def batch_of(step: int) -> list[Sequence]:
    """64 sequences of four kinds, of token ids of their own."""
    rng = np.random.default_rng(step)
    kinds, lengths = rng.integers(0, 4, 64), rng.integers(10, 40, 64)
    tokens = [rng.integers(24 * k, 24 * k + 24, n) for k, n in zip(kinds, lengths, strict=True)]
    return [Sequence(i, t, t, True) for i, t in enumerate(tokens)]


def record(model, comm) -> list[TraceStep]:
    found = []
    with torch.no_grad():
        for step in range(4):
            mine = share_of(batch_of(step), comm)
            micro = make_micro_batch(mine, 0, gather_step([mine], comm), comm)
            model.runtime.recorder.active = True
            model(micro)
            found.append(model.runtime.recorder.finish(comm, 0, micro.tokens))
    return found


def rehome_on(rank: int, case: Case) -> dict:
    model, comm = build(case)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    seats, N = LearntSeats(comm.mesh.ep_size), comm.mesh.ep_size
    loss = run_step(model, comm, case, [batch_of(9)]).tolist()
    recorded, rest = record(model, comm), {"padded": False, "micro_batches": 1, "seats": seats}
    stays = rehome(model, optimizer, recorded, steps_until_next=0, **rest)
    seats.seen.observe(recorded[0].features, recorded[0].lengths, np.ones((len(recorded[0].lengths), N)))
    kept = seats.seen.moments.any()
    first, before = seats.predictor.coefficients.copy(), current_owners(model)
    moved = rehome(model, optimizer, recorded, steps_until_next=10**9, **rest)
    owners = current_owners(model)
    rows = [rows_of_all_layers(s, owners, N) for s in recorded]
    moments = seats.predictor.moments.copy()
    fresh = LearntSeats(N)
    learnt = learn_seats(fresh, recorded, owners, comm)
    return {
        "stays": stays.to_dict(), "moved": moved.to_dict(), "before": before, "owners": owners, "first": first,
        "losses": (loss, run_step(model, comm, case, [batch_of(9)]).tolist()), "moments": moments,
        "noted": (kept, seats.seen.moments.any()),
        "coefficients": seats.predictor.coefficients, "alone": (learnt, fresh.predictor.coefficients),
        "seen": [(s.features, s.lengths, r) for s, r in zip(recorded, rows, strict=True)],
    }  # fmt: skip


@pytest.mark.parametrize("ep_size", [4, 2])
def test_experts_move_with_seats_and_seats_are_learnt_of_where_they_are(ep_size: int):
    answers = run_ranks(rehome_on, 4, Case(**{**vars(CASE), "ep_size": ep_size}))
    first = answers[0]
    assert not first["stays"]["pays"] and first["stays"]["learnt"]
    assert first["moved"]["pays"] and first["moved"]["num_moved"] == (first["owners"] != first["before"]).sum() > 0
    assert first["moved"]["predicted_seconds_per_step"] < first["moved"]["present_seconds_per_step"]
    assert first["moved"]["predicted_num_bytes_per_step"] < first["moved"]["present_num_bytes_per_step"]
    np.testing.assert_allclose(*first["losses"], rtol=1e-5)
    for a in answers[1:]:
        np.testing.assert_array_equal(a["owners"], first["owners"])
        np.testing.assert_array_equal(a["coefficients"], first["coefficients"])
    assert first["noted"] == (True, False)
    # What was learnt before experts moved is forgotten: of all groups' recordings, each sequence once.
    expected = RowPredictor(ep_size)
    for group in range(0, 4, ep_size):
        for seen in answers[group]["seen"]:
            expected.observe(*seen)
    np.testing.assert_allclose(first["moments"], expected.moments, rtol=1e-9)
    assert (first["coefficients"] != first["first"]).any()
    # A model that has no predictor learns one alone.
    learnt, alone = first["alone"]
    assert learnt
    np.testing.assert_array_equal(alone, first["coefficients"])


def bfloat16_around_a_move(rank: int) -> tuple[float, float]:
    """Loss of one batch before experts move, and after, rows and products in bfloat16."""
    case = Case(shrunk("moe-llm-tiny"), 2, recipe="luffy", dtype=torch.float32)
    model, comm = build(case)
    model.stream_dtype = torch.bfloat16
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0)
    keep_over_micro_batches()
    try:
        before = float(run_step(model, comm, case, [batch_of(9)])[0])
        for layer, moe in enumerate(model.moe_layers):
            owner = np.arange(8) // 4
            move_experts(moe, optimizer, np.random.default_rng(layer).permutation(owner), comm)
        return before, float(run_step(model, comm, case, [batch_of(9)])[0])
    finally:
        keep_over_micro_batches(False)


def test_experts_that_moved_compute_with_their_own_weights_in_bfloat16():
    """Weights are kept in the dtype of computation between passes; a move must end what was kept."""
    for before, after in run_ranks(bfloat16_around_a_move, 2):
        assert after == pytest.approx(before, rel=2e-3)
