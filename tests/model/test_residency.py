"""Experts that visit other ranks: nothing changes but who sends what. Against the dense oracle, and by count."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from luffy.comm.meter import DIRECTIONS, INTER_NODE, INTRA_NODE
from luffy.errors import UserError
from luffy.plan.residency import fetched
from luffy.recipes import get_recipe
from luffy.testing import gather_full, oracle_step, run_ranks

from .cases import Case, assert_exact, build, run_step, shrunk, tensors
from .test_traffic import ids_of

SLOW = 1e6  # operations a second: shadows pay


@pytest.mark.parametrize(
    ("preset", "recipe", "world", "changes", "how"),
    [
        pytest.param("moe-gpt2-tiny", "janus", 4, {}, {}, marks=pytest.mark.slow),
        ("moe-llm-tiny", "janus", 4, {"num_experts": 12, "top_k": 3}, {"ranks_per_node": 2, "recompute": True}),
        ("moe-bert-large-tiny", "janus", 2, {}, {"padded": True, "micro_batches": 2}),
        ("moe-gpt2-tiny", "fastermoe", 4, {}, {"expert_flops": SLOW, "ranks_per_node": 2}),
        ("moe-llm-tiny", "fastermoe", 4, {"top_k": 4, "capacity_factor": 1.5}, {"expert_flops": SLOW}),
        ("moe-transformer-xl-tiny", "fastermoe", 2, {}, {"expert_flops": SLOW, "recompute": True}),
        pytest.param(
            "moe-gpt2-tiny", replace(get_recipe("vanilla"), residency="shadow"), 4, {}, {"expert_flops": SLOW},
            marks=pytest.mark.slow,
        ),
        ("moe-gpt2-tiny", replace(get_recipe("vanilla"), residency="fetch"), 4, {}, {"ep_size": 2}),
        ("moe-gpt2-tiny", replace(get_recipe("luffy"), residency="shadow"), 4, {"top_k": 3}, {"expert_flops": SLOW}),
    ],
    ids=lambda v: v if isinstance(v, str) else getattr(v, "name", None),
)  # fmt: skip
def test_exact(preset: str, recipe, world: int, changes: dict, how: dict) -> None:
    """Five steps: loss, every gradient, every weight; experts move once between steps."""
    config = shrunk(preset, **({"num_experts": 16} | changes))
    assert_exact(Case(config, world, recipe=recipe, batch=8, steps=3, rehome_after=(1,), **how))


def count_job(rank: int, case: Case):
    model, comm = build(case)
    initial = {name: p.numpy().copy() for name, p in gather_full(model).items()}
    comm.meter.take()
    run_step(model, comm, case, case.data()[0])
    state = model.runtime.residency
    assert state is not None
    return initial, comm.meter.read(), state.take(), model.moe_layers[0].experts.flat().shape[1]


def test_bytes_of_fetching() -> None:
    """Once to each node that wants an expert, from relay to all others there; the same back; and no token row."""
    case = Case(shrunk("moe-gpt2-tiny", num_experts=12, num_layers=2), 4, recipe="janus", ranks_per_node=2, batch=4)
    answers = run_ranks(count_job, 4, case)
    measured = dict(zip(DIRECTIONS, np.sum([a[1] for a in answers], axis=0), strict=True))
    for direction in ("dispatch", "combine", "dispatch_backward", "combine_backward"):
        assert measured[direction].sum() == 0
    owner = np.arange(12) // 3
    width = answers[0][3] + answers[0][3] % 2  # padded to two parts
    intra = inter = guests = 0
    for layer in oracle_step(case.config, tensors(answers[0][0]), case.data()[0][:1]).outputs[0].layers:
        ids = [ids_of(layer.served[r : r + 1], 2) for r in range(4)]
        wanted = fetched(np.stack([np.bincount(i.ravel()[i.ravel() >= 0], minlength=12) for i in ids]), owner)
        for e in range(12):
            for node in (0, 1):
                visitors = [r for r in (2 * node, 2 * node + 1) if wanted[e, r] and r != owner[e]]
                guests += len(visitors)
                if owner[e] // 2 == node:
                    intra += len(visitors)
                else:
                    inter += bool(visitors)
                    intra += max(0, len(visitors) - 1)
    assert guests == answers[0][2]["guests"] > 0
    assert measured["experts"][INTER_NODE] == 2 * inter * width * 8
    assert measured["experts"][INTRA_NODE] == 2 * intra * width * 8


def test_bytes_of_shadows() -> None:
    """Every rank but the owner gets a shadow; scatter and all-gather move one expert each, and the same back."""
    case = Case(shrunk("moe-gpt2-tiny"), 4, recipe="fastermoe", batch=4, expert_flops=SLOW)
    answers = run_ranks(count_job, 4, case)
    measured = dict(zip(DIRECTIONS, np.sum([a[1] for a in answers], axis=0), strict=True))
    guests, width = answers[0][2]["guests"], answers[0][3] + -answers[0][3] % 4
    assert guests > 0 and guests % 3 == 0
    assert measured["experts"][INTRA_NODE] == 2 * guests * width * 8
    assert measured["dispatch"][INTRA_NODE] == measured["dispatch_backward"][INTRA_NODE] > 0


def limit_job(rank: int, case: Case) -> str:
    model, comm = build(case)
    state = model.runtime.residency
    assert state is not None
    state.limit_num_bytes = 1000
    with pytest.raises(UserError) as raised:
        run_step(model, comm, case, case.data()[0])
    return str(raised.value)


def test_a_limit_names_the_option_on_every_rank() -> None:
    messages = run_ranks(limit_job, 2, Case(shrunk("moe-gpt2-tiny"), 2, recipe="janus"))
    assert len(set(messages)) == 1 and messages[0].startswith("--fetch-limit 1e-06GB")


def prefetch_job(rank: int, case: Case) -> tuple[list[int], list[float]]:
    """Bytes of experts by step; the second step finds on its way what it wants."""
    model, comm = build(case)
    sent, losses = [], []
    for step in case.data():
        losses.append(float(run_step(model, comm, case, step)[0]))
        sent.append(int(comm.meter.take()[DIRECTIONS.index("experts")].sum()))
    return sent, losses


def test_prefetched_and_missing_experts() -> None:
    """Steps of other data want other experts: those fetched in vain change nothing, those missing are fetched."""
    case = Case(shrunk("moe-gpt2-tiny", num_experts=16), 2, recipe="janus", batch=2, steps=4)
    static = run_ranks(prefetch_job, 2, replace(case, recipe="vanilla_dedup"))
    moved = run_ranks(prefetch_job, 2, case)
    np.testing.assert_allclose(moved[0][1], static[0][1], rtol=1e-12)
    assert all(n > 0 for n in moved[0][0]) and torch.tensor(static[0][0]).sum() == 0
