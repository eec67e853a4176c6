"""A recorded step, replayed, is the step: the same plans and, byte for byte, the traffic that the meter counted."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from luffy.comm.meter import DIRECTIONS
from luffy.plan.replay import replay_step
from luffy.recipes import Recipe, get_recipe
from luffy.seats.features import features_of
from luffy.testing import oracle_step, run_ranks
from luffy.testing.oracle_tools import gather_full
from luffy.train.rehoming import current_owners, wire_of

from .cases import Case, build, run_step, shrunk, tensors

WORLD = 4
PAPER = replace(get_recipe("luffy_paper"), condense="none")


def record(rank: int, case: Case) -> dict:
    """One step with the recorder on: the trace, the meter's token rows summed over ranks, and a replay of them."""
    model, comm = build(case, ranks_per_node=2)
    initial = {name: p.numpy().copy() for name, p in gather_full(model).items()}
    comm.meter.take()
    model.runtime.recorder.active = True
    run_step(model, comm, case, case.data()[0])
    counts = comm.meter.read()
    counts[:, 0] = 0  # a rank's own rows never enter a collective, so their class is empty but for padding
    mine = [
        np.asarray(s.tokens) for s in case.data()[0][0][rank * case.batch // WORLD : (rank + 1) * case.batch // WORLD]
    ]
    trace = model.runtime.recorder.finish(comm, 1, torch.from_numpy(np.concatenate(mine)))
    replay = replay_step(trace, current_owners(model), wire_of(model, case.padded), trace.home_rank)
    return {"initial": initial, "counts": counts, "trace": trace, "replay": replay}


@pytest.mark.parametrize(
    ("recipe", "preset", "changes"),
    [
        ("vanilla", "moe-gpt2-tiny", {"top_k": 4}),
        ("vanilla_dedup", "moe-llm-tiny", {"top_k": 4, "capacity_factor": 0.7}),
        ("luffy", "moe-gpt2-tiny", {"num_layers": 3}),
        (PAPER, "moe-gpt2-tiny", {"num_layers": 3}),
        ("netmoe", "moe-bert-large-tiny", {"moe_every": 2, "num_layers": 4}),
        ("netmoe", "moe-llm-tiny", {}),
        (replace(get_recipe("vanilla_dedup"), wire="aggressive"), "moe-llm-tiny", {"num_layers": 3, "top_k": 4}),
        ("janus", "moe-gpt2-tiny", {"num_experts": 16}),
        ("fastermoe", "moe-gpt2-tiny", {"num_experts": 16}),
        (replace(get_recipe("vanilla_dedup"), wire="combine_backward=int8"), "moe-gpt2-tiny", {"num_layers": 3}),
        (replace(get_recipe("luffy"), residency="shadow"), "moe-gpt2-tiny", {"num_layers": 3}),
    ],
    ids=str,
)
def test_replayed_bytes_are_the_meters(recipe: str | Recipe, preset: str, changes: dict) -> None:
    case = Case(shrunk(preset, **changes), WORLD, recipe=recipe, batch=8, lengths="equal", expert_flops=1e6)
    answers = run_ranks(record, WORLD, case)
    measured = np.sum([a["counts"] for a in answers], axis=0)
    replay = answers[0]["replay"]
    for direction in ("dispatch", "combine", "dispatch_backward", "combine_backward"):
        expected = np.sum([getattr(x, direction) for x in replay], axis=0)[1:]
        np.testing.assert_array_equal(measured[DIRECTIONS.index(direction), 1:], expected)
    # There and back; an expert travels in two parts, which may leave an element of padding.
    experts = 2 * np.sum([x.experts for x in replay], axis=0)[1:]
    np.testing.assert_allclose(measured[DIRECTIONS.index("experts"), 1:], experts, rtol=1e-3)
    named = recipe if isinstance(recipe, Recipe) else get_recipe(recipe)
    assert (experts.sum() > 0) == (named.residency != "static")


def test_the_trace_holds_what_the_oracle_chose_on_every_rank() -> None:
    case = Case(shrunk("moe-gpt2-tiny", num_layers=3), WORLD, recipe="netmoe", batch=8)
    answers = run_ranks(record, WORLD, case)
    trace = answers[0]["trace"]
    for a in answers[1:]:
        np.testing.assert_array_equal(a["trace"].chosen, trace.chosen)
        np.testing.assert_array_equal(a["trace"].foreseen, trace.foreseen)
    (output,) = oracle_step(case.config, tensors(answers[0]["initial"]), case.data()[0]).outputs
    assert trace.lengths.tolist() == [len(s.tokens) for s in case.data()[0][0]]
    features = features_of([np.asarray(s.tokens) for s in case.data()[0][0]])
    for a in answers:
        np.testing.assert_array_equal(a["trace"].features, features)
    for layer, choices in enumerate(output.layers):
        served = np.concatenate([s.numpy() for s in choices.served])
        np.testing.assert_array_equal(np.sort(trace.chosen[layer], axis=1), np.argwhere(served)[:, 1].reshape(-1, 2))
    assert trace.foreseen.shape == (2, *trace.chosen.shape[1:])
    assert (trace.foreseen >= 0).all()
