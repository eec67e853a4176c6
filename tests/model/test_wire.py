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

from . import cases
from .cases import Case

# Relative error of the whole gradient, and of the loss, that a format may bring into this small model.
LIMITS = {"bf16": (0.02, 2e-3), "int8": (0.05, 5e-3), "fp8": (0.15, 1e-2), "aggressive": (0.5, 5e-2)}


def wired_job(rank, case):
    out = {}
    for wire in ("model", *LIMITS):
        recipe = replace(get_recipe(case.recipe), wire=wire)
        cases.get_recipe = lambda name, recipe=recipe: recipe  # this process is a fork of its own
        model, comm = cases.build(case)
        comm.meter.take()
        loss = cases.run_step(model, comm, case, case.data()[0])
        gradients = {n: g.numpy() for n, g in gather_full(model, gradients=True).items()}
        out[wire] = (float(loss), gradients, by_direction(comm.meter.read()))
    return out
