"""What ranks do in the tests of luffy.titan: torchtitan's models by its own all-to-all and by Luffy's exchange."""

from __future__ import annotations

import gc
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor
from torchtitan.config import override
from torchtitan.config.override import derive
from torchtitan.models.common.moe import GroupedExperts

import luffy.titan
from benchmarks.titan_counting import CountedDispatcher
from examples.torchtitan_luffy import Loop, on_a_cpu
from luffy.titan.dispatch import LuffyTokenDispatcher
from luffy.train.own_metrics import numbers_of

EXACT = f"{__name__}.exact_experts"
COUNTED = "benchmarks.titan_counting.counted"
EXCHANGE = "luffy.titan.exchange"


class ExactExperts(GroupedExperts):
    """torchtitan's experts in their input's dtype; its own compute in bfloat16, whatever that is."""

    @dataclass(kw_only=True, slots=True)
    class Config(GroupedExperts.Config):
        pass

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        weights = [w.to_local() if isinstance(w, DTensor) else w for w in (self.w1_EFD, self.w2_EDF, self.w3_EFD)]
        parts = x_RD.split(num_tokens_per_expert_E.tolist())
        return torch.cat(
            [(F.silu(x @ a.t()) * (x @ c.t())) @ b.t() for x, a, b, c in zip(parts, *weights, strict=True)]
        )


@override(target=GroupedExperts.Config)
def exact_experts(cfg: Any) -> Any:
    return derive(cfg, ExactExperts.Config)


def gradients_of(loop: Loop) -> dict[str, Tensor]:
    """This rank's shards."""
    return {n: p.grad.to_local() for n, p in loop.model.named_parameters() if p.grad is not None}


def beside_their_own(rank: int, model: str, **settings: Any) -> dict[str, float]:
    """One forward and backward by each: losses, the worst difference of any gradient over its largest value, bytes."""
    CountedDispatcher.sent = 0
    theirs = Loop(on_a_cpu(model, [EXACT, COUNTED], **settings))
    loss = theirs.gradients()
    ours = Loop(on_a_cpu(model, [EXACT, EXCHANGE], **settings))
    own_loss = ours.gradients()
    numbers = luffy.titan.metrics(ours.model)
    expected, found = gradients_of(theirs), gradients_of(ours)
    assert expected.keys() == found.keys()
    worst = max(
        float((found[n] - g).abs().max() / g.abs().max().clamp_min(1e-12)) for n, g in expected.items() if g.numel()
    )
    return {
        "loss": float(loss), "own_loss": float(own_loss), "worst": worst, "gradients": len(expected),
        "their_bytes": CountedDispatcher.sent, **numbers,
    }  # fmt: skip


def losses(rank: int, overrides: list[Any], steps: int) -> dict[str, Any]:
    """Of some optimizer steps: losses, bytes, and what share of the rows the loader moved."""
    config = on_a_cpu("deepseek_v3", [EXACT, *overrides], layers=2)
    config.training.seq_len = 64
    loop = Loop(config)
    found, moved, sent = [], [], []
    for _ in range(steps):
        found.append(loop.step())
        moved.append(getattr(loop.loader, "moved_share", 0.0))
        sent.append(luffy.titan.metrics(loop.model)["bytes_sent"])
    return {"losses": found, "moved": moved, "bytes": sent, "state": sorted(loop.loader.state_dict())}


def one_layer(rank: int, top_k: int, wire: str = "model") -> dict[str, float]:
    """The dispatcher with linear experts of random matrices, against a dense loop: largest differences, in float64."""
    mesh = init_device_mesh("cpu", (torch.distributed.get_world_size(),), mesh_dim_names=("ep",))
    N, E, T, D = mesh.size(), 8, 13 + rank, 6
    maker = torch.Generator().manual_seed(1)
    matrices = torch.randn(E, D, D, generator=maker, dtype=torch.float64)
    own = torch.Generator().manual_seed(10 + rank)
    x = torch.randn(T, D, generator=own, dtype=torch.float64)
    scores, ids = torch.randn(T, E, generator=own, dtype=torch.float64).sigmoid().topk(top_k)
    upstream = torch.randn(T, D, generator=own, dtype=torch.float64)
    counts = torch.bincount(ids.flatten(), minlength=E)

    dispatcher = LuffyTokenDispatcher.Config(num_experts=E, top_k=top_k, wire=wire).build()
    dispatcher.wire_meshes(ep_mesh=mesh)
    leaves = [x.clone().requires_grad_(), scores.clone().requires_grad_(), matrices.clone().requires_grad_()]
    rows, per_expert, told = dispatcher.dispatch(leaves[0], leaves[1], ids, counts)
    mine = leaves[2][rank * (E // N) : (rank + 1) * (E // N)]
    parts = rows.split(per_expert.tolist())
    out = dispatcher.combine(torch.cat([p @ m for p, m in zip(parts, mine, strict=True)]), told, leaves[0])
    out.backward(upstream)
    torch.distributed.all_reduce(leaves[2].grad)
    total = counts.clone()
    torch.distributed.all_reduce(total)

    dense = [x.clone().requires_grad_(), scores.clone().requires_grad_(), matrices.clone().requires_grad_()]
    answers = torch.einsum("td,tkde->tke", dense[0], dense[2][ids])
    wanted = (dense[1][..., None] * answers).sum(1)
    wanted.backward(upstream)
    torch.distributed.all_reduce(dense[2].grad)
    off = {
        name: float((a.grad - b.grad).abs().max())
        for name, a, b in zip(("to_x", "to_scores", "to_matrices"), leaves, dense, strict=True)
    }
    ranks = ids // (E // N)
    away = sum(len(set(row) - {rank}) for row in ranks.tolist())
    sent = numbers_of([dispatcher.runtime])
    return off | {
        "out": float((out - wanted).abs().max()),
        "counts_alike": float(torch.equal(per_expert, total.view(N, -1)[rank])),
        "rows_away": away, "rows_sent": sent["rows_sent"], "bytes_dispatch": sent["bytes_dispatch"],
        "bytes_combine_backward": sent["bytes_combine_backward"],
    }  # fmt: skip


def resumed(rank: int) -> tuple[list, list]:
    """Token ids of two batches after a state was taken, and of another loader that took it up."""
    overrides = [EXACT, EXCHANGE, ("luffy.titan.seats", {"refresh": 1})]
    loop = Loop(on_a_cpu("qwen3", overrides, layers=1))
    for _ in range(3):
        loop.step()
    state = loop.loader.state_dict()
    through = [next(loop.batches)[0]["input"].tolist() for _ in range(2)]
    del loop.model, loop.optimizers
    other = Loop(on_a_cpu("qwen3", overrides, layers=1))
    loop = None
    gc.collect()
    other.loader.load_state_dict(state)
    return through, [next(other.batches)[0]["input"].tolist() for _ in range(2)]


def asks_for(rank: int, what: str) -> None:
    """What a model with the exchange and seats cannot have."""
    overrides = [EXACT, EXCHANGE, "luffy.titan.seats"]
    tp_size = 2 if what == "shared batches" else 1
    config = on_a_cpu("qwen3", overrides, checkpointing="none", tp_size=tp_size, layers=1)
    if what == "compiled blocks":
        config.compile.enable, config.compile.components, config.compile.backend = True, ["model"], "eager"
    Loop(config).gradients()
