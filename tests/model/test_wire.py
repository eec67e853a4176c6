"""A model whose rows cross links in few bits: what it loses, what it saves, and what is refused."""

from dataclasses import replace

import numpy as np
import pytest

from luffy.comm.meter import by_direction
from luffy.config import model_preset
from luffy.errors import UserError
from luffy.recipes import check_recipe, get_recipe
from luffy.testing import gather_full, run_ranks
from luffy.train.options import TrainOptions

from .cases import Case, build, run_step, shrunk

# How far a format may turn the whole gradient of this small model (relative L2), and move its loss: about three times
# what was seen. Its stream is 32 wide, one block, and its weights are vivid: real models lose less.
LIMITS = {"bf16": (0.005, 3e-4), "int8": (0.017, 1e-3), "fp8": (0.07, 7e-3), "aggressive": (0.2, 5e-3)}
BYTES = {"bf16": 2 * 32, "int8": 34, "fp8": 34}
DIRECTIONS = ("dispatch", "combine", "dispatch_backward", "combine_backward")


def wired_job(rank, case):
    out = {}
    for wire in ("model", *LIMITS):
        recipe = replace(get_recipe("vanilla_dedup"), wire=wire)
        model, comm = build(replace(case, recipe=recipe))
        comm.meter.take()
        loss = run_step(model, comm, case, case.data()[0])
        counted = by_direction(comm.meter.read())
        gradient = np.concatenate([g.numpy().ravel() for g in gather_full(model, "grad").values()])
        out[wire] = (float(loss[0]), gradient, counted)
    return out


@pytest.mark.parametrize("recompute", [False, True])
def test_fewer_bits_cost_what_they_should_and_stay_close(recompute):
    case = Case(shrunk("moe-gpt2-tiny"), world=2, recompute=recompute)
    results = run_ranks(wired_job, 2, case)
    for got in results:
        loss, gradient, _ = got["model"]
        for wire, (most_off, most_loss) in LIMITS.items():
            its_loss, its_gradient, _ = got[wire]
            off = np.linalg.norm(its_gradient - gradient) / np.linalg.norm(gradient)
            assert 0 < off < most_off, (wire, off)
            assert abs(its_loss / loss - 1) < most_loss, (wire, its_loss, loss)
    # A choice of the second layer may fall otherwise, so bytes are compared by row size where rows are as many.
    for wire, row in BYTES.items():
        for direction in DIRECTIONS:
            plain, coded = (sum(r[w][2][direction] for r in results) for w in ("model", wire))
            assert coded % row == 0
            assert coded == pytest.approx(plain / (8 * 32) * row, rel=0.05), (wire, direction)


def test_what_wire_does_not_go_with_is_refused_at_once():
    for recipe in ("luffy", "netmoe", "luffy_paper"):
        with pytest.raises(UserError, match="--wire int8 cannot be combined with --recipe"):
            TrainOptions(recipe=recipe, wire="int8")
        TrainOptions(recipe=recipe, wire="model")
    with pytest.raises(UserError, match="--wire int5"):
        TrainOptions(wire="int5")
    assert TrainOptions(wire="safe").get_recipe().wire == "safe"
    check_recipe(TrainOptions(recipe="vanilla", wire="combine=int4").get_recipe(), model_preset("moe-gpt2-tiny"))
