"""luffy.Seats in a loop of one's own: the same step as without, fewer rows away from home, resumed to the bit."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import luffy
from luffy.comm import Comm, build_mesh
from luffy.errors import UserError
from luffy.hf import CausalLM, parallelize
from luffy.seats.features import DIM
from luffy.testing import run_ranks
from luffy.testing.oracle_tools import relative_error
from tests.hf.tiny import tiny_config, tiny_model

WIDTH, VOCABULARY, LENGTH, BATCH = 16, 64, 12, 8


class Own(nn.Module):
    def __init__(self, mesh: Any, **settings: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Embedding(VOCABULARY, WIDTH)
        self.moe = luffy.MoEBlock(WIDTH, 12, 4, top_k=1, mesh=mesh, **settings)
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
        logits = self.head(self.moe(self.embed(ids)))
        return F.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum")


def batch_of(step: int, rank: int) -> tuple[Tensor, Tensor]:
    """Rows of one of two topics each: each has half of the vocabulary."""
    generator = torch.Generator().manual_seed(1000 * step + rank)
    topic = torch.randint(0, 2, (BATCH, 1), generator=generator)
    ids = torch.randint(0, VOCABULARY // 2, (BATCH, LENGTH + 1), generator=generator) + topic * (VOCABULARY // 2)
    return ids[:, :-1], ids[:, 1:]


def steps(model: Own, comm: Comm, seats: luffy.Seats | None, which: range) -> list[tuple[list[Tensor], float, float]]:
    """Gradients (no update), the share of rows at home, and of sequences that moved, of each step."""
    sync, found = luffy.GradientSync(model, comm), []
    for step in which:
        model.zero_grad()
        moved = 0.0
        for micro in range(2):
            ids, labels = batch_of(2 * step + micro, comm.mesh.rank)
            if seats is not None:
                seated = seats.take(ids, labels=labels)
                assert seated.num_labels == BATCH * LENGTH * comm.mesh.world_size
                ids, labels, moved = seated.input_ids, seated.labels, seated.moved_share
            (sync(ids, labels) / labels.numel()).backward()
        with torch.no_grad():
            model(*batch_of(0, 0))  # an evaluation between is not learnt from
        sync.finish()
        if seats is not None:
            seats.step()
        home = luffy.metrics(model)["rows_home"]
        found.append(([p.grad.clone() for p in model.parameters()], home, moved))  # type: ignore[union-attr]
    return found


def learn(rank: int) -> tuple[float, float]:
    mesh = build_mesh(torch.device("cpu"))
    model = Own(mesh).double()
    with torch.no_grad():  # topics want different experts
        model.embed.weight[: VOCABULARY // 2, 0] += 4
        model.embed.weight[VOCABULARY // 2 :, 0] -= 4
        model.moe.moe.router.weight[:, 0] = torch.tensor([2.0, 2.0, -2.0, -2.0])
    comm, seats = model.moe.runtime.comm, luffy.Seats(model)
    without, within = steps(model, comm, None, range(14)), steps(model, comm, seats, range(12))
    state = seats.state_dict()
    within += steps(model, comm, seats, range(12, 14))
    for (expected, *_), (found, *_) in zip(without, within, strict=True):
        for a, b in zip(expected, found, strict=True):
            assert relative_error(b, a) < 1e-10
    assert all(moved == 0 for _, _, moved in within[:10]) and within[10][2] > 0

    again = luffy.Seats(model)
    again.load_state_dict(state)
    for a, b in zip(steps(model, comm, again, range(12, 14)), within[12:], strict=True):
        assert a[1:] == b[1:] and all(torch.equal(x, y) for x, y in zip(a[0], b[0], strict=True))
    for key, value in seats.state_dict().items():
        assert torch.equal(again.state_dict()[key], value)

    other = {name: value[:, :-1] if name == "moments" else value for name, value in state.items()}
    again.load_state_dict(other)  # of another number of ranks
    assert not again.seats.is_fitted and int(again.state_dict()["step"]) == 0
    return without[-1][1], within[-1][1]


def test_gradients_stay_and_rows_come_home() -> None:
    for stays, comes in run_ranks(learn, 2):
        assert comes > stays + 0.2


def packed_and_padded(rank: int) -> None:
    """Rows of a model of the library: several sequences in a row, padding on the left, and both layouts learn alike."""
    mesh = build_mesh(torch.device("cpu"))
    model = parallelize(tiny_model(tiny_config("mixtral")), mesh)
    seats = luffy.Seats(model)
    ids = torch.arange(24).view(2, 12) + rank
    positions = torch.cat([torch.arange(5), torch.arange(7)]).expand(2, 12)
    seated = seats.take(ids, labels=ids, position_ids=positions)
    assert len(seated.input_ids) == 2
    model(model.batch(**seated.inputs))
    seats.step()
    layers = model.config.num_layers * model.config.router.top_k
    tokens, rows = seats.seats.seen.moments[0, 0], seats.seats.seen.moments[0, -2:].sum()
    assert tokens == 24 and 24 * model.config.num_layers <= rows <= 24 * layers

    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    seats.take(ids, labels=ids, attention_mask=mask)  # step 2 of 2 is not observed
    assert model.runtime.observed is None


def under_a_trainer(rank: int) -> None:
    """As a Trainer calls it: rows that train sit where the predictor says, with the same loss and gradients."""
    mesh = build_mesh(torch.device("cpu"))
    model = CausalLM(parallelize(tiny_model(tiny_config("mixtral")), mesh)).train()
    ids = torch.randint(0, 40, (4, 9), generator=torch.Generator().manual_seed(rank))
    mask = torch.ones_like(ids)
    mask[1, :3] = 0
    found = []
    seats = model.seats
    assert seats is not None
    for model.seats in (None, seats):
        model.zero_grad()
        loss = model(ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss
        loss.backward()
        model.sync.finish()
        gradients = [p.grad.clone() for p in model.parameters() if p.grad is not None]
        found.append((model.sync.comm.all_reduce(loss.detach().clone()), gradients, luffy.metrics(model)["rows_home"]))
        draws = torch.Generator().manual_seed(1)
        random = torch.randint(-(1 << 14), 1 << 14, (1 + DIM, 2), generator=draws)
        seats.seats.predictor.coefficients = random.numpy()
    (plain, expected, before), (loss, gradients, after) = found
    assert before != after  # some rows did sit elsewhere
    assert relative_error(loss, plain) < 1e-12
    for a, b in zip(expected, gradients, strict=True):
        assert relative_error(b, a) < 1e-10
    with torch.no_grad():
        assert model.eval()(ids).logits.shape == (4, 9, model.config.vocab_size)  # of this rank's own rows


def refused(rank: int) -> None:
    mesh = build_mesh(torch.device("cpu"))
    with pytest.raises(UserError, match="Seats: Linear holds no"):
        luffy.Seats(nn.Linear(2, 2))
    with pytest.raises(UserError, match="recipe luffy_paper moves sequences behind layers"):
        luffy.Seats(parallelize(tiny_model(tiny_config("mixtral")), mesh, recipe="luffy_paper"))
    model = Own(mesh)
    seats = luffy.Seats(model)
    ids, _ = batch_of(0, rank)
    seats.take(ids)
    model.moe(torch.randn(3, 5, WIDTH))
    with pytest.raises(UserError, match="no layer saw the 8 sequences"):
        seats.step()


def test_rows_of_a_library_model_and_what_is_refused() -> None:
    run_ranks(packed_and_padded, 2)
    run_ranks(under_a_trainer, 2)
    run_ranks(refused, 2)
