"""The exchange for loaders of users: every token arrives once, at its seat, and every result comes home."""

import numpy as np
import pytest
import torch

from luffy.comm import Comm, build_mesh
from luffy.comm.meter import DIRECTIONS
from luffy.errors import RankMismatchError, UserError
from luffy.seats.exchange import exchange
from luffy.seats.layout import SeatLayout
from luffy.seats.seater import AsRead, LearntSeats
from luffy.testing import run_ranks

LENGTH, KINDS = 24, 4


def batch(rank: int, seed: int, equal: bool) -> dict[str, torch.Tensor]:
    """Sequences of kinds with token ids of their own, padded left, right or on both sides."""
    rng = np.random.default_rng((rank, seed))
    rows = 16 if equal else 10 + 3 * rank
    ids, mask, labels = torch.zeros(3, rows, LENGTH + rank, dtype=torch.int64)
    for row in range(rows):
        n = 20 if equal else int(rng.integers(1, LENGTH))
        begin, kind = int(rng.integers(0, LENGTH + rank - n + 1)), int(rng.integers(0, KINDS))
        ids[row, begin : begin + n] = torch.from_numpy(rng.integers(50 * kind, 50 * kind + 50, n))
        mask[row, begin : begin + n] = 1
        labels[row] = torch.where(mask[row] > 0, ids[row] + 7, -100)
        labels[row, begin] = -100
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask, "position_ids": positions}


def learnt(ep_size: int) -> LearntSeats:
    """Kind k wants rank k % ep_size."""
    seats, rng = LearntSeats(ep_size), np.random.default_rng(5)
    kinds = rng.integers(0, KINDS, 300)
    features = seats.describe([rng.integers(50 * k, 50 * k + 50, 20) for k in kinds])
    rows = np.where(np.arange(ep_size) == kinds[:, None] % ep_size, 60, 5)
    seats.predictor.observe(features, np.full(300, 20), rows)
    assert seats.predictor.solve()
    return seats


def go_and_come(rank: int, ep_size: int, equal: bool) -> dict:
    comm = Comm.create(build_mesh(torch.device("cpu"), ep_size))
    mine = batch(rank, 0, equal)
    layout = SeatLayout(ep_size, comm.mesh.dp_size)
    seated = exchange(comm, learnt(ep_size), **mine, layout=layout)
    sums = seated.input_ids.sum(1).double() * 1.5
    vectors = torch.stack([seated.input_ids, seated.position_ids], dim=2).to(torch.bfloat16)
    home, tokens = seated.sequences_home(sums), seated.tokens_home(vectors, fill=-1)
    assert torch.equal(home, mine["input_ids"].sum(1).double() * 1.5)
    expected = torch.stack([mine["input_ids"], mine["position_ids"]], dim=2).to(torch.bfloat16)
    mask = mine["attention_mask"].bool()
    assert torch.equal(tokens[mask], expected[mask]) and (tokens[~mask] == -1).all()
    assert torch.equal(seated.tokens_home(seated.labels, fill=-100), mine["labels"])

    unseated = exchange(comm, AsRead(), mine["input_ids"], attention_mask=mine["attention_mask"])
    assert unseated.labels is None and set(unseated.inputs) == {"input_ids", "attention_mask"}
    assert unseated.moved_share == 0
    assert torch.equal(unseated.input_ids[unseated.attention_mask.bool()], mine["input_ids"][mask])
    # What was moved, counted by hand: three int32 a token.
    comm.meter.take()
    again = exchange(comm, learnt(ep_size), **mine, layout=layout)
    gone = mask.sum(1)[torch.from_numpy(again.seat_of_own != rank)].sum()
    sent = comm.meter.take()[DIRECTIONS.index("control")].sum()
    own, world = len(mask), comm.mesh.world_size
    widest = 16 if equal else 10 + 3 * (world - 1)
    assert sent == gone * 12 + (world - 1) * (4 + widest * (1 + 256) + 1) * 8

    refused = {}
    for name, error, call in (
        ("shape", UserError, lambda: exchange(comm, AsRead(), mine["input_ids"], labels=mine["labels"][:, :3])),
        ("rows", UserError, lambda: seated.sequences_home(torch.zeros(1000))),
        ("given", RankMismatchError, lambda: exchange(comm, AsRead(), mine["input_ids"],
                                                      labels=mine["labels"] if rank else None)),
        ("state", RankMismatchError, lambda: exchange(comm, _other(ep_size, rank), **mine, layout=layout)),
    ):  # fmt: skip
        with pytest.raises(error) as caught:
            call()
        refused[name] = str(caught.value)
    return {
        "refused": refused, "own": own, "num_labels": seated.num_labels, "moved": seated.moved_share,
        "seated": [(s[m].tolist(), t[m].tolist(), p[m].tolist()) for s, t, p, m in zip(
            seated.input_ids, seated.labels, seated.position_ids, seated.attention_mask.bool(), strict=True)],
    }  # fmt: skip


def _other(ep_size: int, rank: int) -> LearntSeats:
    """Seats whose state differs on rank 1."""
    seats = learnt(ep_size)
    if rank == 1:
        seats.predictor.coefficients = -seats.predictor.coefficients[:, ::-1]
    return seats


@pytest.mark.parametrize(("world", "ep_size"), [(2, 2), (4, 4), (4, 2)])
@pytest.mark.parametrize("equal", [True, False])
def test_sequences_reach_their_seats_and_results_their_readers(world: int, ep_size: int, equal: bool):
    answers = run_ranks(go_and_come, world, ep_size, equal)
    there, read = [], []
    for rank, a in enumerate(answers):
        there += a["seated"]
        own = batch(rank, 0, equal)
        mask = own["attention_mask"].bool()
        names = ("input_ids", "labels", "position_ids")
        read += [tuple(own[n][row][mask[row]].tolist() for n in names) for row in range(len(mask))]
        assert a["num_labels"] == sum(int((batch(r, 0, equal)["labels"] != -100).sum()) for r in range(world))
        assert a["moved"] > 0.2
        assert len(a["seated"]) == a["own"] or not equal
        assert "labels [" in a["refused"]["shape"] and "1000" in a["refused"]["rows"]
        assert "ranks [1] decided other seats" in a["refused"]["state"]
    assert sorted(there) == sorted(read)
    at_home = [[row[0][0] // 50 % ep_size == rank % ep_size for row in a["seated"]] for rank, a in enumerate(answers)]
    assert np.mean(np.concatenate(at_home)) > 0.7
