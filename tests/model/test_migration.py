"""Moving sequences changes where they are computed, never what: every strategy, every preset, random plans included."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.comm import Comm, build_mesh
from luffy.comm.meter import by_direction
from luffy.data.batch import Layout, SequenceTable
from luffy.errors import RankMismatchError
from luffy.exchange.migrate import Migration, transfer
from luffy.recipes import Recipe, get_recipe
from luffy.testing import run_ranks

from .cases import PRESETS, TINY_PRESETS, Case, assert_exact, build, run_step, shrunk

PAPER = replace(get_recipe("luffy_paper"), condense="none")
MOVING = (PAPER, get_recipe("netmoe"))
RANDOM = Recipe("random", "random balanced plans", placement="random")


@pytest.mark.parametrize("preset", PRESETS)
def test_random_plans_equal_the_oracle_in_loss_gradients_and_trained_weights(preset):
    """Random plans move more than any planner would: uneven lengths, shared experts, accumulation, recomputation."""
    assert_exact(
        Case(
            shrunk(preset, num_shared_experts=1, top_k=4 if preset == "moe-llm-tiny" else 2),
            world=4,
            recipe=RANDOM,
            batch=8,
            micro_batches=2,
            steps=3,
            recompute=True,
            padded=preset == "moe-bert-large-tiny",
        )
    )


@pytest.mark.parametrize("recipe", MOVING, ids=lambda r: r.name)
def test_every_strategy_equals_the_oracle(recipe):
    for world, lengths, preset in ((2, "uneven", "moe-gpt2-tiny"), (4, "equal", "moe-bert-large-tiny")):
        assert_exact(Case(shrunk(preset), world=world, recipe=recipe, batch=8, lengths=lengths, steps=2))


@pytest.mark.parametrize(("preset", "ep_size"), [("moe-gpt2-tiny", 4), ("moe-llm-tiny", 2)])
def test_rehomed_experts_train_on_as_if_they_had_not_moved(preset, ep_size):
    """Weights and both moments of AdamW move with an expert, twice; sequences migrate before and after."""
    case = Case(shrunk(preset), world=4, ep_size=ep_size, recipe="netmoe", batch=8, steps=5, rehome_after=(1, 3))
    assert_exact(case)


def test_tokens_that_capacity_left_without_an_expert_move_with_their_sequence():
    """Such a token reached no rank, so no row carries its residual, which travels from its old home."""
    for shared in (0, 1):
        config = shrunk("moe-gpt2-tiny", capacity_factor=0.3, num_shared_experts=shared)
        assert_exact(Case(config, world=4, recipe=RANDOM, batch=8, steps=2))


@pytest.mark.slow
def test_two_data_parallel_groups_and_dense_blocks_between():
    config = shrunk("moe-llm-tiny", moe_every=2, num_layers=4)
    assert_exact(Case(config, world=4, ep_size=2, recipe=RANDOM, batch=8, micro_batches=2, steps=2))


@pytest.mark.slow
@settings(max_examples=12, deadline=None)
@given(
    preset=st.sampled_from(TINY_PRESETS),
    world=st.sampled_from([2, 4]),
    recipe=st.sampled_from([*MOVING, RANDOM]),
    top_k=st.sampled_from([1, 2, 4]),
    shared=st.booleans(),
    padded=st.booleans(),
    capacity=st.sampled_from([None, 0.5]),
    lengths=st.sampled_from(["uneven", "equal"]),
)
def test_any_combination_equals_the_oracle(preset, world, recipe, top_k, shared, padded, capacity, lengths):
    config = shrunk(preset, top_k=top_k, num_shared_experts=int(shared), capacity_factor=capacity)
    assert_exact(Case(config, world=world, recipe=recipe, batch=8, padded=padded, lengths=lengths, steps=2))


def _bytes(rank, case):
    """Bytes by direction of one step, and what the plans said they would be."""
    model, comm = build(case)
    planner = model.runtime.planner
    predicted = 0
    if planner is not None:
        whole = planner.plan

        def watched(layer, layout, counts, *rest):
            nonlocal predicted
            planned = whole(layer, layout, counts, *rest)
            migration = planned.migration
            home = layout.table.home_rank if migration is None else migration.new.table.home_rank
            away = counts.sum() - counts[np.arange(len(home)), home].sum()
            predicted += int(away) * model.config.hidden_size * 8  # float64
            return planned

        planner.plan = watched
    run_step(model, comm, case, case.data()[0])
    counts = torch.from_numpy(comm.meter.read().astype(np.float64))
    return by_direction(comm.all_reduce(counts).numpy().astype(np.int64)), predicted


def _bytes_of_all(rank, cases):
    return [_bytes(rank, case) for case in cases]


def test_combine_bytes_are_those_of_the_plan_and_never_above_staying():
    case = Case(shrunk("moe-gpt2-tiny"), world=4, batch=8, lengths="equal")
    one_layer = replace(case, config=shrunk("moe-gpt2-tiny", num_layers=1))
    cases = [replace(case, recipe=recipe) for recipe in (PAPER, get_recipe("netmoe"), RANDOM)]
    cases += [one_layer, replace(one_layer, recipe="netmoe")]
    *planned, (stay, _), (moved, _) = run_ranks(_bytes_of_all, 4, cases)[0]
    for counted, predicted in planned:
        assert counted["combine"] == counted["combine_backward"] == predicted
        assert counted["dispatch"] == counted["dispatch_backward"]
    assert moved["dispatch"] == stay["dispatch"]
    assert moved["combine"] < stay["combine"]


def _disagree(rank, case):
    model, comm = build(case)
    planner = model.runtime.planner
    if rank == 2:
        planner.strategy = "stay"
    with pytest.raises(RankMismatchError, match=r"MoE layer 0: ranks \[2\]"):
        run_step(model, comm, case, case.data()[0])
    return True


def test_ranks_that_plan_differently_stop_and_name_the_layer_and_the_ranks():
    case = Case(shrunk("moe-gpt2-tiny"), world=4, recipe=RANDOM, batch=8, lengths="equal")
    assert run_ranks(_disagree, 4, case) == [True] * 4


def _transfers(rank):
    mesh = build_mesh(torch.device("cpu"))
    comm = Comm.create(mesh)
    rng = np.random.default_rng(0)
    for _ in range(20):
        lengths = rng.integers(1, 9, 11)
        old = SequenceTable(lengths, rng.integers(0, 4, 11))
        new = old.moved(rng.integers(0, 4, 11))
        before, after = Layout(old, rank, mesh.device), Layout(new, rank, mesh.device)
        (arrived,) = transfer([before.global_token], before, after, comm, "control")
        assert torch.equal(arrived, after.global_token)
        _, home, row = Migration(before, after, np.zeros((11, 4), int), np.zeros(11, int)).place_of(after.global_token)
        assert (home == rank).all()
        assert torch.equal(row, torch.arange(after.num_tokens))
    return True


def test_what_follows_a_sequence_arrives_in_its_row():
    assert run_ranks(_transfers, 4) == [True] * 4
