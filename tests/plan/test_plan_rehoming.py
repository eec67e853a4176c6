from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from luffy.plan.rehoming import RehomingProblem, plan_rehoming, predicted_num_bytes
from luffy.plan.result import PlanError

from .problems import topology


def planted(num_experts, num_ranks, *, seed=0, ranks_per_node=None, stray=0.1, **options):
    """Top-2 tokens: each rank's sequences want one hidden cluster of experts, but for a share of strays."""
    rng = np.random.default_rng(seed)
    size = num_experts // num_ranks
    clusters = rng.permutation(num_experts).reshape(num_ranks, size)
    liked = rng.permutation(num_ranks)
    affinity = np.zeros((num_ranks, num_experts), dtype=np.int64)
    together = np.zeros((num_experts, num_experts), dtype=np.int64)
    for group in np.repeat(np.arange(num_ranks), 400):
        pool = clusters[liked[group]] if rng.random() >= stray else np.arange(num_experts)
        e, f = rng.choice(pool, 2, replace=False)
        affinity[group, [e, f]] += 10
        together[e, f] += 10
        together[f, e] += 10
    owner = np.empty(num_experts, dtype=np.int64)
    owner[clusters] = np.argsort(liked)[:, None]
    problem = RehomingProblem(
        affinity,
        together,
        np.arange(num_experts) // size,
        topology(num_ranks, ranks_per_node),
        row_num_bytes=1536,
        **{"expert_num_bytes": 1 << 20, **options},
    )
    return problem, owner


@pytest.mark.parametrize(("E", "N", "ranks_per_node"), [(8, 4, 4), (16, 4, 2), (32, 8, 4), (64, 8, 1)])
@pytest.mark.parametrize("seed", range(3))
def test_finds_the_planted_clusters(E, N, ranks_per_node, seed):
    problem, owner = planted(E, N, seed=seed, ranks_per_node=ranks_per_node)
    plan = plan_rehoming(problem)
    plan.check(problem)
    assert plan.num_bytes == predicted_num_bytes(problem, owner)
    assert plan.new_owner.tolist() == owner.tolist()
    assert sum(plan.num_bytes[1:]) < 0.5 * sum(plan.present_num_bytes[1:])


def test_clusters_matter_even_when_nobody_lives_anywhere():
    """Every group wants every expert alike: only co-activation can be saved."""
    problem, owner = planted(16, 4, stray=0.05, load_slack=None)
    uniform = replace(problem, affinity=np.tile(problem.affinity.sum(axis=0) // 4, (4, 1)))
    plan = plan_rehoming(uniform)
    plan.check(uniform)
    same = plan.new_owner[:, None] == plan.new_owner[None, :]
    assert (same == (owner[:, None] == owner[None, :])).all()


def test_prediction_counts_copies_of_real_tokens():
    """Against tokens one by one: a top-2 token crosses once for each other rank that owns an expert of it."""
    rng = np.random.default_rng(1)
    E, N, T = 8, 4, 300
    experts = np.stack([rng.choice(E, 2, replace=False) for _ in range(T)])
    home = np.zeros(T, dtype=int)  # all tokens on one rank: then the spread over links is exact
    affinity, together = np.zeros((N, E), int), np.zeros((E, E), int)
    for t in range(T):
        affinity[home[t], experts[t]] += 1
        together[experts[t, 0], experts[t, 1]] += 1
        together[experts[t, 1], experts[t, 0]] += 1
    owner = rng.permutation(np.arange(E) // 2)
    problem = RehomingProblem(affinity, together, owner, topology(N, 2), 1, 1, passes=1)
    crossing = [0, 0, 0]
    for t in range(T):
        for rank in set(owner[experts[t]].tolist()):
            crossing[problem.topology.link_class(home[t], rank)] += 1
    assert predicted_num_bytes(problem, owner) == tuple(crossing)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from([(4, 4), (8, 2), (6, 3), (12, 1), (12, 4)]), st.integers(0, 10_000), st.booleans())
def test_never_worse_than_the_present_and_always_even(shape, seed, two_nodes):
    E, N = shape
    rng = np.random.default_rng(seed)
    together = rng.integers(0, 50, (E, E))
    problem = RehomingProblem(
        rng.integers(0, 100, (5, E)),
        together + together.T,
        rng.permutation(np.arange(E) // (E // N)),
        topology(N, N // 2 if two_nodes and N % 2 == 0 else N),
        row_num_bytes=64,
        expert_num_bytes=1000,
        group_rank=rng.integers(0, N, 5),
        load_slack=[None, 0.0, 0.2][seed % 3],
    )
    plan = plan_rehoming(problem)
    plan.check(problem)
    weigh = problem.topology.weighted_bytes
    assert weigh(plan.num_bytes) <= weigh(plan.present_num_bytes)
    if problem.load_slack is not None:
        tokens = problem.affinity.sum(axis=0)
        now, then = (np.bincount(owner, tokens, N).max() for owner in (problem.owner, plan.new_owner))
        assert then <= max(now, tokens.sum() / N * (1 + problem.load_slack))
    again = plan_rehoming(replace(problem))
    assert again.new_owner.tolist() == plan.new_owner.tolist()


def test_the_best_mapping_is_left_alone():
    problem, _ = planted(16, 4)
    settled = replace(problem, owner=plan_rehoming(problem).new_owner)
    plan = plan_rehoming(settled)
    assert plan.num_moved == 0 and plan.move_num_bytes == (0, 0, 0) and not plan.pays


def test_whether_it_pays_depends_on_time_and_weight():
    problem, _ = planted(16, 4)
    assert plan_rehoming(problem).pays
    assert not plan_rehoming(replace(problem, steps_until_next=0)).pays
    assert not plan_rehoming(replace(problem, expert_num_bytes=1 << 50)).pays


def test_bytes_to_move():
    problem, _ = planted(16, 4, ranks_per_node=2)
    plan = plan_rehoming(problem)
    classes = [problem.topology.link_class(a, b) for a, b in zip(problem.owner, plan.new_owner, strict=True)]
    assert plan.move_num_bytes == (0, classes.count(1) << 20, classes.count(2) << 20)
    assert plan.num_moved == classes.count(1) + classes.count(2)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"owner": np.zeros(8, int)}, "rank 0 owns 8 experts, not 2"),
        ({"owner": np.zeros(7, int)}, "do not divide"),
        ({"owner": np.arange(8)}, "owner must lie in 0..3"),
        ({"affinity": np.zeros((3, 8), int)}, "affinity is"),
        ({"affinity": -np.ones((4, 8), int)}, ">= 0"),
        ({"coactivation": np.zeros((8, 7), int)}, "coactivation is"),
        ({"coactivation": np.triu(np.ones((8, 8), int))}, "symmetric"),
        ({"group_rank": np.full(4, 9)}, "group_rank must lie"),
        ({"affinity": np.full((4, 8), 1 << 50)}, "below"),
        ({"row_num_bytes": 0}, "positive"),
        ({"steps_until_next": -1}, ">= 0"),
    ],
)
def test_problems_that_make_no_sense(change, complaint):
    problem, _ = planted(8, 4)
    with pytest.raises(ValueError, match=complaint):
        replace(problem, **change)


def test_check_names_what_is_wrong():
    problem, _ = planted(8, 4)
    plan = plan_rehoming(problem)
    worst = plan.new_owner[::-1].copy()
    settled = replace(problem, owner=plan.new_owner)
    for bad, where, complaint in [
        (replace(plan, new_owner=plan.new_owner[:-1]), problem, "not int64"),
        (replace(plan, new_owner=np.zeros(8, dtype=np.int64)), problem, "rank 0 owns 8"),
        (replace(plan, slot_to_expert=np.zeros(8, dtype=np.int64)), problem, "every expert once"),
        (replace(plan, slot_to_expert=plan.slot_to_expert[::-1].copy()), problem, "disagree"),
        (replace(plan, num_bytes=(0, 0, 0)), problem, "predicted bytes"),
        (
            replace(
                plan,
                new_owner=worst,
                slot_to_expert=np.argsort(worst, kind="stable"),
                num_bytes=predicted_num_bytes(problem, worst),
            ),
            settled,
            "worse than",
        ),
    ]:
        with pytest.raises(PlanError, match=complaint):
            bad.check(where)
