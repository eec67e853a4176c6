"""Micro-batches that take turns compute what they would one after the other: every recipe, and in the same order of
collectives on every rank, forward and backward."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from luffy.comm import rows
from luffy.recipes import Recipe
from luffy.testing import run_ranks

from .cases import Case, assert_exact, build, run_step, shrunk

RANDOM = Recipe("random", "random balanced plans", placement="random")
CASES = (
    ("vanilla", "moe-gpt2-tiny", 2, {}),
    ("vanilla_dedup", "moe-llm-tiny", 4, {"top_k": 4, "num_shared_experts": 1}),
    ("netmoe", "moe-gpt2-tiny", 4, {"moe_every": 2, "num_layers": 3}),
    (RANDOM, "moe-llm-tiny", 4, {"capacity_factor": 1.0}),
    ("fastermoe", "moe-gpt2-tiny", 2, {}),
    ("janus", "moe-gpt2-tiny", 2, {}),
    (RANDOM, "moe-bert-large-tiny", 2, {}),
)


@pytest.mark.parametrize(("recipe", "preset", "world", "changes"), CASES, ids=lambda x: str(getattr(x, "name", x)))
def test_turns_equal_the_oracle(recipe: Any, preset: str, world: int, changes: dict[str, Any]) -> None:
    config = shrunk(preset, **changes)
    labelled = 1.0 if config.causal else 0.4
    recompute = preset == "moe-llm-tiny"
    assert_exact(
        Case(config, world=world, recipe=recipe, micro_batches=2, steps=3, overlap=True, labelled=labelled,
             recompute=recompute, expert_flops=1e8)
    )  # fmt: skip


def _most_under_way(rank: int, case: Case) -> list[int]:
    """The most messages that were under way at once, forward and backward."""
    model, comm = build(case)
    now, most = [0], [0, 0]
    send, wait = rows._send, rows._Message.wait

    def sending(*args: Any) -> Any:
        now[0] += 1
        backward = torch._C._current_graph_task_id() >= 0
        most[backward] = max(most[backward], now[0])
        return send(*args)

    def waiting(message: Any) -> Any:
        now[0] -= 1
        return wait(message)

    rows._send, rows._Message.wait = sending, waiting  # type: ignore[method-assign,assignment]
    run_step(model, comm, case, case.data()[0])
    return most


def test_rows_of_one_travel_while_the_other_computes_in_both_passes() -> None:
    case = Case(shrunk("moe-gpt2-tiny", num_layers=3), world=2, micro_batches=2)
    assert run_ranks(_most_under_way, 2, case) == [[1, 1], [1, 1]]
    assert run_ranks(_most_under_way, 2, replace(case, overlap=True)) == [[2, 2], [2, 2]]
