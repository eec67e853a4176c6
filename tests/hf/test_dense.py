"""Sharded dense weights: the same losses, gradients and updates as replicated ones, of which a rank keeps its share."""

from __future__ import annotations

import gc
from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.multiprocessing.reductions import StorageWeakRef

pytest.importorskip("transformers")

from luffy.comm import Mesh, build_mesh
from luffy.errors import UserError
from luffy.hf import dense, parallelize
from luffy.hf.dense import whole
from luffy.hf.model import ParallelModel
from luffy.model.sharding import gather, is_sharded, whole_shape
from luffy.model.transformer import is_expert
from luffy.recipes import Recipe, get_recipe
from luffy.testing import run_ranks
from luffy.train.gradients import GradientSync, make_optimizer

from .tiny import collate, random_rows, tiny_config, tiny_model, wide

TOLERANCE = 1e-10
RANDOM = Recipe("random", "sequences anywhere", placement="random")


@dataclass(frozen=True)
class Case:
    family: str
    recipe: Recipe
    recompute: bool = False
    ep_size: int | None = None
    tied: bool = False
    adapters: int = 0


def full_gradient(parallel: ParallelModel, parameter: torch.Tensor) -> torch.Tensor | None:
    if parameter.grad is None or not is_sharded(parameter):
        return parameter.grad
    grad = parameter.grad.clone()
    grad.whole_shape = whole_shape(parameter)  # type: ignore[attr-defined]
    return gather(parallel.runtime.comm, [grad])[0]


def train(case: Case, mesh: Mesh, how: str) -> dict[str, torch.Tensor]:
    """Two steps, each of three micro-batches of which two take turns; everything that came of them, in full."""
    model = tiny_model(tiny_config(case.family, tie_word_embeddings=case.tied))
    parallel = parallelize(model, mesh, case.recipe, recompute=case.recompute, dense=how)
    comm, found = parallel.runtime.comm, dict[str, torch.Tensor]()
    if case.adapters:
        parallel.adapt(case.adapters)
    sync = GradientSync(parallel, comm)
    optimizer = make_optimizer(parallel, 1e-2, 0.1, fused=False)
    for step in range(2):
        micros = []
        for i in range(3):
            # The last rank has nothing in one of them.
            count = 0 if i == 1 and mesh.rank == mesh.world_size - 1 else 2
            rows = random_rows(100 * step + 10 * i + mesh.rank, count, 12)
            micros.append(parallel.batch(**collate(rows, "right")))
        labels, tokens = sum(m.step_labels for m in micros), sum(m.num_tokens for m in micros)
        micros = [replace(m, step_labels=labels, step_tokens=tokens) for m in micros]
        alone = sync(micros[0], last=False)
        alone.loss.backward()
        first, second = sync(micros[1], micros[2], last=True)
        (first.loss + second.loss).backward()
        sync.finish()
        loss = (alone.loss + first.loss + second.loss).detach()
        found[f"{step} loss"] = comm.all_reduce(loss)
        for name, p in parallel.named_parameters():
            grad = full_gradient(parallel, p)
            assert (grad is None) == (not p.requires_grad), name
            if grad is not None:
                found[f"{step} gradient of {name}"] = grad.clone()
        found[f"{step} norm"] = sync.clip(0.5)
        assert float(found[f"{step} norm"]) > 0.5, "clipping has nothing to do"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, p in parallel.named_parameters():
            found[f"{step} weight {name}"] = whole(comm, p).clone()
    with torch.no_grad():
        found["logits"] = parallel.logits(micros[0])
    found |= {f"memory of {k}": torch.tensor(v) for k, v in memory(parallel, optimizer).items()}
    return found


def memory(parallel: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Elements on this rank: dense weights and moments, and those of them that are matrices outside of gates."""
    others = [(n, p) for n, p in parallel.named_parameters() if not is_expert(n)]
    matrices = [p for n, p in others if p.dim() >= 2 and ".gate." not in n]
    moments = [v for _, p in others for v in optimizer.state.get(p, {}).values() if v.dim() > 0]
    return {
        "weights": float(sum(p.numel() for _, p in others)),
        "matrices": float(sum(p.numel() for p in matrices)),
        "moments": float(sum(v.numel() for v in moments)),
    }


def compare(rank: int, cases: list[Case]) -> list[dict[str, float]]:
    """For each case: the worst relative error and shares of memory, sharded over replicated."""
    meshes: dict[int | None, Mesh] = {}
    out = []
    for case in cases:
        if case.ep_size not in meshes:
            meshes[case.ep_size] = build_mesh(torch.device("cpu"), case.ep_size)
        with wide():
            plain, sharded = (train(case, meshes[case.ep_size], how) for how in ("replicated", "sharded"))
        assert plain.keys() == sharded.keys()
        shares = {k: float(sharded.pop(k) / plain.pop(k)) for k in [k for k in plain if k.startswith("memory")]}
        errors = {k: float((sharded[k] - v).norm() / v.norm().clamp_min(1e-9)) for k, v in plain.items()}
        worst = max(errors, key=lambda k: errors[k])
        assert errors[worst] < TOLERANCE, f"{worst}: {errors[worst]:.1e} ({case})"
        moved = [k for k in plain if k.startswith("1 weight") and not torch.equal(plain[k], plain["0" + k[1:]])]
        assert moved, "no weight was updated"
        out.append(shares)
    return out


def test_two_ranks() -> None:
    cases = [
        Case("mixtral", get_recipe("luffy"), recompute=True),
        Case("deepseek_v3", RANDOM),
        Case("qwen2_moe", get_recipe("luffy"), tied=True),
        Case("mixtral", get_recipe("luffy"), adapters=2),
    ]
    for case, shares in zip(cases, run_ranks(compare, 2, cases)[0], strict=True):
        if not case.adapters:
            check_memory(shares, 2)


def test_four_ranks_one_of_them_empty() -> None:
    cases = [
        Case("mixtral", RANDOM, ep_size=2),
        Case("deepseek_v3", get_recipe("luffy"), recompute=True),
        Case("gpt_oss", get_recipe("vanilla")),
    ]
    for shares in run_ranks(compare, 4, cases)[0]:
        check_memory(shares, 4)


def check_memory(shares: dict[str, float], world: int) -> None:
    """61 rows of the vocabulary are 31 + 30, or 16 + 16 + 16 + 13; gates, norms and biases are not divided."""
    assert shares["memory of matrices"] == pytest.approx(1 / world, rel=0.02)
    assert shares["memory of weights"] < 1 / world + 0.09
    assert shares["memory of moments"] < 1 / world + 0.09


def refuse(rank: int) -> Any:
    with pytest.raises(UserError, match="--dense 'split' must be one of replicated, sharded"):
        parallelize(tiny_model(tiny_config("mixtral")), build_mesh(torch.device("cpu")), dense="split")


def hold_on(rank: int) -> None:
    """Which whole weights are alive between forward and backward pass, and after it."""
    alive: list[StorageWeakRef] = []
    gathered: list[int] = []  # weights at once

    def noting(*args: Any, **kwargs: Any) -> list[torch.Tensor]:
        made = gather(*args, **kwargs)
        gathered.append(len(made))
        alive.extend(StorageWeakRef(w.untyped_storage()) for w in made)
        return made

    for recompute in (False, True):
        model = tiny_model(tiny_config("deepseek_v3"))
        parallel = parallelize(model, build_mesh(torch.device("cpu")), recompute=recompute, dense="sharded")
        micros = [parallel.batch(**collate(random_rows(i + rank, 3, 9), "right")) for i in range(2)]
        alive.clear()
        gathered.clear()
        with patch.object(dense, "gather", noting):
            first, second = parallel(*micros)
            loss = first.loss + second.loss
            # Embedding, first layer (dense, so it is over before the other's turn) and head for each micro-batch; two
            # layers for both together.
            assert len(gathered) == 3 * 2 + 2
            assert sum(gathered) > 20
            # The head of each micro-batch, which the backward pass begins with, and no layer's.
            kept = [w for w in alive if not w.expired()]
            assert len(kept) == 2
            loss.backward()
        assert len(gathered) == 8 + 4, "in the backward pass every layer is gathered again"
        del loss, first, second, kept
        gc.collect()
        assert not [w for w in alive if not w.expired()]


def test_a_layer_is_whole_only_while_it_is_computed() -> None:
    run_ranks(hold_on, 2)


def test_another_word_is_refused() -> None:
    run_ranks(refuse, 1)
