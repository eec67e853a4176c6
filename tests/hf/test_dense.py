"""Sharded dense weights: the same losses, gradients and updates as replicated ones, of which a rank keeps its share."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup

pytest.importorskip("transformers")

from luffy.comm import Mesh, build_mesh
from luffy.comm.meter import by_direction
from luffy.comm.sharding import Unit, is_sharded, local_part, whole
from luffy.errors import UserError
from luffy.hf import parallelize
from luffy.hf.model import ParallelModel
from luffy.model.ownership import expert_parameters
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
            assert (p.grad is None) == (not p.requires_grad), name
            if p.grad is not None:
                found[f"{step} gradient of {name}"] = whole(p.grad).clone()
        found[f"{step} norm"] = sync.clip(0.5)
        assert float(found[f"{step} norm"]) > 0.5, "clipping has nothing to do"
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        for name, p in parallel.named_parameters():
            found[f"{step} weight {name}"] = whole(p).clone()
    with torch.no_grad():
        found["logits"] = parallel.logits(micros[0])
    found |= {f"memory of {k}": torch.tensor(v) for k, v in memory(parallel, optimizer).items()}
    return found


def memory(parallel: ParallelModel, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Elements on this rank: dense weights and moments, and those of them that are matrices outside of gates."""
    experts = expert_parameters(parallel)
    others = [(n, p) for n, p in parallel.named_parameters() if n not in experts]
    matrices = [p for n, p in others if p.dim() >= 2 and ".gate." not in n]
    moments = [v for _, p in others for v in optimizer.state.get(p, {}).values() if v.dim() > 0]
    return {
        "weights": float(sum(local_part(p).numel() for _, p in others)),
        "matrices": float(sum(local_part(p).numel() for p in matrices)),
        "moments": float(sum(local_part(v).numel() for v in moments)),
    }


def compare(rank: int, cases: list[Case], device: str = "cpu") -> list[dict[str, float]]:
    """For each case: shares of memory, sharded over replicated, once all else is the same."""
    if device == "cuda":
        device = f"cuda:{torch.cuda.current_device()}"
    meshes: dict[int | None, Mesh] = {}
    out = []
    for case in cases:
        if case.ep_size not in meshes:
            meshes[case.ep_size] = build_mesh(torch.device(device), case.ep_size)
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


@pytest.mark.slow
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


def hold_on(rank: int, recompute: bool) -> None:
    """Which weights are whole in the forward pass, between the passes, in the backward pass, and after it."""
    model = tiny_model(tiny_config("deepseek_v3"))
    parallel = parallelize(model, build_mesh(torch.device("cpu")), recompute=recompute, dense="sharded")
    micros = [parallel.batch(**collate(random_rows(i + rank, 3, 9), "right")) for i in range(2)]
    units, meter = parallel.units, parallel.runtime.comm.meter
    assert units is not None
    everything = {"embedding": units.embedding, **dict(enumerate(units.layers)), "head": units.head}
    gathered: list[Any] = []  # which unit, call by call
    most = 0  # layers that were whole at once
    # Of a rank's part, as it is sent: rows are padded to be as many on each rank.
    num_bytes = {k: sum(-(-len(p) // 2) * p[0].numel() * 8 for p in u.parameters()) for k, u in everything.items()}
    seen: list[torch.nn.Parameter] = []  # every whole weight there was

    def is_whole(unit: Unit) -> bool:
        return not any(is_sharded(p) for p in unit.parameters())

    def noting(self: FSDPParamGroup, *args: Any, **kwargs: Any) -> None:
        nonlocal most
        before = self._all_gather_result
        unshard(self, *args, **kwargs)
        if self._all_gather_result is not before:
            gathered.append(next(k for k, u in everything.items() if u is self.modules[0]))
        most = max(most, sum(map(is_whole, units.layers)))

    def leaving(self: Unit, *args: Any, **kwargs: Any) -> torch.Tensor:
        assert is_whole(self)
        seen.extend(self.parameters())
        return leave(self, *args, **kwargs)

    unshard, leave = FSDPParamGroup.unshard, Unit.leave
    with patch.object(FSDPParamGroup, "unshard", noting), patch.object(Unit, "leave", leaving):
        meter.take()
        first, second = parallel(*micros)
        # The first layer is dense, so it is over before the other's turn; the others are gathered for both.
        assert gathered == ["embedding", 0, 1, "embedding", 0, 2, "head"]
        assert most == 1
        assert [k for k, u in everything.items() if is_whole(u)] == ["head"], "what the backward pass begins with"
        assert len(seen) > 20
        kept = {id(p) for p in seen if p.untyped_storage().size() > 0}
        assert kept == {id(p) for p in units.head.parameters()}
        forward = [num_bytes[k] for k in gathered]
        gathered.clear()
        (first.loss + second.loss).backward()
    assert sorted(map(str, gathered)) == ["0", "0", "1", "2", "head"]
    sent = by_direction(meter.take())["gradients"]
    # Gathered so often, and the gradients of both micro-batches summed once.
    assert sent == sum(forward) + sum(num_bytes[k] for k in gathered) + sum(num_bytes.values())
    assert most == 2, "one layer, and the next one ahead"
    assert not [k for k, u in everything.items() if is_whole(u)]
    assert not [p for p in seen if p.untyped_storage().size() > 0]


def test_a_layer_is_whole_only_while_it_is_computed() -> None:
    for recompute in (False, True):
        run_ranks(hold_on, 2, recompute)


def test_another_word_is_refused() -> None:
    run_ranks(refuse, 1)
