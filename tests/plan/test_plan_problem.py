"""Mistakes are named: in problems, in plans, in names and options."""

from dataclasses import replace

import numpy as np
import pytest

from luffy.errors import UserError
from luffy.plan.placement import Balance, PlanError, num_bytes_per_class, plan_placement

from .problems import make_problem


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"counts": np.zeros((5, 4), int)}, "counts is"),
        ({"counts": np.zeros((6, 4))}, "counts must be integers"),
        ({"counts": -np.ones((6, 4), int)}, "counts must be >= 0"),
        ({"next_counts": np.zeros((6, 3), int)}, "next_counts is"),
        ({"home_rank": np.full(6, 4)}, "home_rank must lie in 0..3"),
        ({"home_rank": np.zeros(5, int)}, "home_rank is"),
        ({"lengths": np.full(6, -1)}, "lengths must be"),
        ({"row_num_bytes": 0}, "row_num_bytes"),
        ({"layout": "square"}, "layout"),
    ],
)
def test_problems_that_make_no_sense(change, complaint):
    with pytest.raises(ValueError, match=complaint):
        replace(make_problem(6, 4), **change)


def test_balance_that_makes_no_sense():
    with pytest.raises(ValueError, match="mode"):
        Balance("bytes")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slack"):
        Balance("tokens", -0.1)
    assert Balance.for_lengths(np.array([5, 5])).mode == "sequences"
    assert Balance.for_lengths(np.array([5, 6])).mode == "tokens"


def test_check_names_what_is_wrong():
    problem = make_problem(12, 4, seed=1)
    plan = plan_placement("best", problem)

    def broken(**change):
        return replace(plan, **change)

    elsewhere = plan.new_home.copy()
    elsewhere[3] = 4
    crowded = np.zeros(12, dtype=np.int64)
    costly = plan_placement("random", problem, seed=0).new_home
    for bad, complaint in [
        (broken(new_home=plan.new_home[:-1]), r"not int64 \(12,\)"),
        (broken(new_home=plan.new_home.astype(np.int32)), "int32"),
        (broken(new_home=elsewhere), "sequence 3 goes to rank 4 of a world of 4"),
        (broken(new_home=crowded), "rank 0 gets 12 sequences, must keep 3"),
        (broken(new_home=costly), "predicted bytes"),
        (broken(num_bytes=(0, 0, 0)), "predicted bytes"),
    ]:
        with pytest.raises(PlanError, match=complaint):
            bad.check(problem)


def test_check_catches_a_plan_above_stay_and_over_budget():
    problem = make_problem(12, 4, seed=1)
    homely = replace(problem, home_rank=plan_placement("exact", problem).new_home)
    worse = np.roll(homely.home_rank, 1)
    plan = replace(plan_placement("best", homely), new_home=worse, num_bytes=num_bytes_per_class(homely, worse))
    with pytest.raises(PlanError, match="above staying"):
        plan.check(homely)
    uneven = make_problem(12, 4, seed=1, uneven=True)
    pile = np.zeros(12, dtype=np.int64)
    plan = replace(plan_placement("best", uneven), new_home=pile, num_bytes=num_bytes_per_class(uneven, pile))
    with pytest.raises(PlanError, match=r"rank 0 gets .* tokens"):
        plan.check(uneven)


def test_unknown_names_and_options():
    problem = make_problem(4, 2)
    with pytest.raises(UserError, match="no such strategy; choose one of stay"):
        plan_placement("greedy", problem)
    with pytest.raises(UserError, match="no option 'speed'; its options are: rounds"):
        plan_placement("best", problem, speed=9)
    with pytest.raises(UserError, match="num_candidates"):
        plan_placement("luffy_paper", problem, num_candidates=0)
    for option in ({"rounds": -1}, {"bottleneck_weight": -1.0}, {"prices": np.zeros(3)}):
        with pytest.raises(UserError, match=f"best: {next(iter(option))}"):
            plan_placement("best", problem, **option)
