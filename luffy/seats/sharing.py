"""One predictor on all ranks: what ranks observed is added up, and all take what the first makes of it."""

from __future__ import annotations

from typing import Any

import torch

from luffy.comm import Comm
from luffy.seats.features import DIM
from luffy.seats.predictor import RowPredictor
from luffy.seats.seater import LearntSeats

EVERY = 50  # steps between refreshes
FIRST = (10, 20, 30)  # steps before the first ones: routers move fast in the beginning
OBSERVE_EVERY = 2  # steps


def refreshes_after(step: int) -> bool:
    """Whether step `step`, counted from 0, is followed by a refresh."""
    done = step + 1
    return done in FIRST or done % EVERY == 0


def learn_together(predictor: RowPredictor, seen: RowPredictor, comm: Comm, direction: str = "control") -> bool:
    """Refresh `predictor`, alike on all ranks, with `seen`: what this rank has observed since the last time.

    Every rank of the world calls it, each with sequences of its own in `seen` (a sequence that two ranks observed
    counts twice), which is emptied. Two sums over ranks. Whether there was anything to learn from.
    """
    mesh = comm.mesh
    fresh = comm.all_reduce(torch.from_numpy(seen.moments.copy()).to(mesh.device), direction)
    seen.forget()
    predictor.fade()
    predictor.moments += fresh.cpu().numpy()
    if not predictor.moments[0, 0] > 0:
        return False
    # Ranks may run on unlike processors, which round otherwise: the first one solves for all.
    found = torch.zeros(1 + DIM, predictor.num_ranks, dtype=torch.int64)
    if mesh.rank == 0 and predictor.solve():
        found = torch.from_numpy(predictor.coefficients)
    predictor.coefficients = comm.all_reduce(found.to(mesh.device), direction).cpu().numpy()
    return True


def shared_state(seats: LearntSeats, comm: Comm) -> dict[str, Any]:
    """The predictor, and what all ranks noted since the last refresh, added up: the same on every rank, to the bit.

    Every rank calls it. What was noted are whole numbers, so that the order does not matter.
    """
    noted = torch.from_numpy(seats.seen.moments.copy()).to(comm.mesh.device)
    return seats.state() | {"noted": comm.all_reduce(noted).cpu()}


def load_shared(seats: LearntSeats, state: dict[str, Any], comm: Comm) -> bool:
    """Take up a `shared_state`; False, and as new, where it is of another number of ranks."""
    fits, noted = seats.predictor.load(state), state.get("noted")
    seats.seen.forget()
    if fits and comm.mesh.rank == 0 and noted is not None and noted.shape == seats.seen.moments.shape:
        seats.seen.moments += noted.numpy()
    return fits
