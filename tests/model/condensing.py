"""Watch what layers condense, and hold a condensed step to the oracle that is told the same."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

import luffy.exchange.condensing as exchange_condensing
from luffy.comm.meter import by_direction
from luffy.condensation import parse_condense
from luffy.exchange.condense import CondenseState
from luffy.recipes import Recipe, get_recipe
from luffy.testing import Condensing, gather_full, largest_error, oracle_step, run_ranks

from .cases import TOLERANCE, Case, build, run_step, tensors, watch_block


class Watch:
    """Notes, while in place, for each MoE layer and rank what was condensed; [T, K] arrays over this rank's tokens."""

    def __init__(self) -> None:
        self.seen: list[dict[str, np.ndarray]] = []
        self._condense = exchange_condensing.condense

    def __enter__(self) -> Watch:
        def condense(state, layer, x, ids, keys, layout, experts, ep_rank, **rest):
            condensed, history = self._condense(state, layer, x, ids, keys, layout, experts, ep_rank, **rest)
            K = ids.shape[1]
            note = {
                "token": layout.global_token, "ids": ids, "rank": keys.rank, "copy": condensed.copy,
                "sent": condensed.sent, "shared": condensed.shared,
                "leader": layout.global_token[condensed.leader // K],
            }  # fmt: skip
            self.seen.append({name: value.cpu().numpy().copy() for name, value in note.items()})
            self.seen[-1]["home"] = np.full(len(ids), ep_rank)
            return condensed, history

        exchange_condensing.condense = condense  # type: ignore[assignment]
        return self

    def __exit__(self, *_: Any) -> None:
        exchange_condensing.condense = self._condense


@dataclass(frozen=True)
class Threshold:
    """Puts another threshold in the place of the recipe's, in all layers; above one, nothing is alike."""

    value: float

    def __call__(self, state: CondenseState) -> None:
        state.thresholds = [self.value] * len(state.thresholds)


def switch_off(state: CondenseState) -> None:
    state.on = False


def condensed_step(rank: int, case: Case, prepare: Callable[[CondenseState], None] | None = None) -> dict[str, Any]:
    """One step: loss, gradients, parameters, what was condensed by layer, bytes by direction of this rank.

    prepare: changes what condenses before the step."""
    model, comm = build(case)
    if prepare is not None:
        assert model.runtime.condense is not None
        prepare(model.runtime.condense)
    initial = {name: value.cpu().clone().numpy() for name, value in gather_full(model).items()}
    last: list[Any] = []
    watch_block(model.blocks[-1], lambda _, after: last.append(after.layout))
    with Watch() as watch:
        loss = run_step(model, comm, case, case.data()[0]).tolist()
    return {
        "seen": watch.seen,
        "last": {"token": last[0].global_token.cpu().numpy(), "home": np.full(last[0].num_tokens, comm.mesh.ep_rank)},
        "bytes": by_direction(comm.meter.read()),
        "loss": loss,
        "initial": initial,
        "gradients": {name: value.cpu().numpy() for name, value in gather_full(model, "grad").items()},
    }


def whole(results: list[dict[str, Any]], layer: int) -> dict[str, np.ndarray]:
    """What all ranks condensed in one layer."""
    return in_order([r["seen"][layer] for r in results])


def in_order(parts: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Arrays of all ranks, rows in the order of global tokens."""
    order = np.argsort(np.concatenate([p["token"] for p in parts]))
    return {name: np.concatenate([p[name] for p in parts])[order] for name in parts[0]}


def leader_table(seen: dict[str, np.ndarray], num_experts: int) -> Tensor:
    """Who stands for each token at each expert: int64 [all tokens, E], the token itself by default."""
    T = len(seen["token"])
    table = np.repeat(np.arange(T)[:, None], num_experts, axis=1)
    for t, k in zip(*np.nonzero(seen["copy"]), strict=True):
        table[t, seen["ids"][t, k]] = seen["leader"][t, k]
    return torch.from_numpy(table)


def assert_condensed_exact(case: Case) -> float:
    """Loss and every gradient are those of the oracle with the same leaders; returns the share of copies kept."""
    return check_condensed_exact(case, run_ranks(condensed_step, case.world, case, backend=case.backend))


def check_condensed_exact(case: Case, results: list[dict[str, Any]]) -> float:
    """`assert_condensed_exact` of what ranks gave back from `condensed_step`."""
    recipe = case.recipe if isinstance(case.recipe, Recipe) else get_recipe(case.recipe)
    scheme = parse_condense(recipe.condense)
    assert scheme is not None
    layers = [whole(results, i) for i in range(len(results[0]["seen"]))]
    told = [
        Condensing(leader_table(s, case.config.router.num_experts), scheme.representative == "centroid",
                   scheme.compensate) for s in layers
    ]  # fmt: skip
    data = case.data()[0]
    if case.seats:  # tokens are numbered as ranks hold them
        batch, seating = case.seat(data)
        data = [[batch[i] for i in np.argsort(seating.rank, kind="stable")]]
    expected = oracle_step(case.config, tensors(results[0]["initial"]), data, condensing=told)
    loss = results[0]["loss"][0]
    assert abs(loss - expected.loss) <= TOLERANCE * abs(expected.loss)
    error, name = largest_error(tensors(results[0]["gradients"]), expected.gradients)
    assert error <= TOLERANCE, f"gradient of {name}: relative error {error:.1e}"
    return float(np.concatenate([s["sent"].ravel() for s in layers]).sum() / sum(s["copy"].sum() for s in layers))
