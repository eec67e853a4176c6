"""MoEBlock.from_module: a module of somebody else's, spread over ranks, answers and learns as it did in one process."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.models.deepseek_v3.modeling_deepseek_v3 import DeepseekV3Config, DeepseekV3MoE
from transformers.models.mixtral.modeling_mixtral import MixtralConfig, MixtralSparseMoeBlock
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

import luffy
from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.recipes import get_recipe
from luffy.testing import run_ranks

D, W, E, K = 16, 24, 4, 2


class OldMixtral(nn.Module):
    """As transformers 4 had it: a linear gate, a list of experts, and logits beside the answer."""

    def __init__(self) -> None:
        super().__init__()
        self.top_k = K
        self.gate = nn.Linear(D, E, bias=False)
        self.experts = nn.ModuleList(
            nn.ModuleDict({"w1": nn.Linear(D, W, False), "w2": nn.Linear(W, D, False), "w3": nn.Linear(D, W, False)})
            for _ in range(E)
        )

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def expert(self, e: int, x: Tensor) -> Tensor:
        own: Any = self.experts[e]
        return own["w2"](F.silu(own["w1"](x)) * own["w3"](x))

    def summed(self, x: Tensor) -> tuple[Tensor, Tensor]:
        flat = x.reshape(-1, D)
        logits = self.gate(flat)
        weights, ids = self.weigh(logits)
        out = torch.zeros_like(flat)
        for e in range(E):
            token, choice = (ids == e).nonzero(as_tuple=True)
            out = out.index_add(0, token, self.expert(e, flat[token]) * weights[token, choice, None])
        return out.view(x.shape), logits

    def forward(self, x: Tensor) -> Any:
        return self.summed(x)


class Stacked(OldMixtral):
    """Plain tensors, [E, in, out] and square; weights of the chosen not rescaled; a shared expert."""

    def __init__(self) -> None:
        super().__init__()
        del self.experts, self.gate
        self.router = nn.Parameter(torch.randn(E, D))
        self.w1, self.w2, self.w3 = (nn.Parameter(0.3 * torch.randn(E, D, D)) for _ in range(3))
        self.shared_expert = nn.Sequential(nn.Linear(D, W), nn.ReLU(), nn.Linear(W, D))

    def gate(self, x: Tensor) -> Tensor:
        return x @ self.router.t()

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.softmax(-1).topk(K, -1)
        return weights, ids

    def expert(self, e: int, x: Tensor) -> Tensor:
        return (F.gelu(x @ self.w1[e]) * (x @ self.w3[e])) @ self.w2[e]

    def forward(self, x: Tensor) -> Tensor:
        return self.summed(x)[0] + self.shared_expert(x)


class Ungated(OldMixtral):
    """Sequential experts with biases, sigmoid scores."""

    def __init__(self) -> None:
        super().__init__()
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(D, W), nn.GELU(), nn.Linear(W, D)) for _ in range(E))

    def weigh(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = logits.sigmoid().topk(K, -1)
        return weights / weights.sum(-1, keepdim=True), ids

    def expert(self, e: int, x: Tensor) -> Tensor:
        return self.experts[e](x)

    def forward(self, x: Tensor) -> Tensor:
        return self.summed(x)[0]


def mixtral() -> nn.Module:
    config = MixtralConfig(hidden_size=D, intermediate_size=W, num_local_experts=E, num_experts_per_tok=K)
    return MixtralSparseMoeBlock(config)


def qwen() -> nn.Module:
    sizes = {"moe_intermediate_size": W, "shared_expert_intermediate_size": 2 * W, "num_experts_per_tok": K}
    return Qwen2MoeSparseMoeBlock(Qwen2MoeConfig(hidden_size=D, num_experts=E, **sizes))


def deepseek() -> nn.Module:
    sizes = {"moe_intermediate_size": W, "n_routed_experts": E, "num_experts_per_tok": K, "n_group": 2, "topk_group": 1}
    return DeepseekV3MoE(DeepseekV3Config(hidden_size=D, n_shared_experts=1, **sizes))


BUILDS: tuple[Callable[[], nn.Module], ...] = (OldMixtral, Stacked, Ungated, mixtral, qwen, deepseek)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    module = build()
    for p in module.parameters():
        nn.init.normal_(p, std=0.5 if p.dim() < 3 else 0.3)
    return module.double()


def rows(num: int) -> Tensor:
    return torch.randn(num, 3, D, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def expected(module: Any, x: Tensor) -> tuple[Any, Tensor]:
    answer = module(x)
    out = answer[0] if isinstance(answer, tuple) else answer
    loss = out.square().sum() + (answer[1].square().sum() if isinstance(answer, tuple) else 0)
    return answer, loss


def whole_experts(module: Any) -> dict[str, Tensor]:
    """Gradients of experts as the block holds them: [E, D, width], [E, F, D] and the biases."""
    if isinstance(module, Ungated):
        lists = {
            "w_in": [e[0].weight.grad.t() for e in module.experts],
            "b_in": [e[0].bias.grad for e in module.experts],
            "w_out": [e[2].weight.grad.t() for e in module.experts],
            "b_out": [e[2].bias.grad for e in module.experts],
        }
        return {n: torch.stack(ts) for n, ts in lists.items()}
    if isinstance(module, Stacked):
        return {"w_in": torch.cat([module.w1.grad, module.w3.grad], -1), "w_out": module.w2.grad}
    if isinstance(module, OldMixtral):
        grads = [{n: e[n].weight.grad.t() for n in ("w1", "w2", "w3")} for e in module.experts]
        return {
            "w_in": torch.stack([torch.cat([g["w1"], g["w3"]], 1) for g in grads]),
            "w_out": torch.stack([g["w2"] for g in grads]),
        }
    experts = module.experts
    return {"w_in": experts.gate_up_proj.grad.transpose(1, 2), "w_out": experts.down_proj.grad.transpose(1, 2)}


def gate_gradient(module: Any) -> Tensor:
    return module.router.grad if isinstance(module, Stacked) else module.gate.weight.grad


def same(rank: int) -> None:
    mesh = build_mesh(torch.device("cpu"))
    for build in BUILDS:
        module = made(build)
        x = rows(4).requires_grad_()
        answer, loss = expected(module, x)
        loss.backward()
        # The one that is taken is another copy, whose gradients nobody has made.
        for recipe in ("luffy", "vanilla"):
            original = made(build)
            before = copy.deepcopy(original.state_dict())
            block = luffy.MoEBlock.from_module(original, mesh, recipe=recipe)
            assert all(torch.equal(original.state_dict()[n], t) for n, t in before.items()), "the module is untouched"
            mine = slice(4 * rank // mesh.world_size, 4 * (rank + 1) // mesh.world_size)
            own = x.detach()[mine].clone().requires_grad_()
            found, part = expected(block, own)
            part.backward()
            other = made(build)
            for p in other.parameters():
                nn.init.zeros_(p)
            block.copy_to(other)
            for name, value in before.items():
                assert torch.equal(other.state_dict()[name], value), name
            label = (getattr(build, "__name__", build), recipe)
            close = (
                {"rtol": 1e-6, "atol": 1e-7} if build is deepseek else {"rtol": 1e-10, "atol": 1e-10}
            )  # float32 gate
            if isinstance(answer, tuple):
                torch.testing.assert_close(found[1], answer[1].view(4, 3, E)[mine].reshape(-1, E), **close)
                found, wanted = found[0], answer[0]
            else:
                wanted = answer
            torch.testing.assert_close(found, wanted[mine], **close, msg=str(label))
            torch.testing.assert_close(own.grad, x.grad[mine], **close, msg=str(label))  # type: ignore[index]
            comm = block.runtime.comm
            grads = whole_experts(module)
            assert set(grads) == {n for n, _ in block.moe.experts.named_parameters()}
            for name, p in block.moe.experts.named_parameters():
                torch.testing.assert_close(
                    comm.all_gather_ep(p.grad).flatten(0, 1), grads[name], **close, msg=str((*label, name))
                )
            (gate,) = block.moe.router.parameters()
            torch.testing.assert_close(comm.all_reduce(gate.grad.clone()), gate_gradient(module), **close)
            shared = getattr(module, "shared_expert", getattr(module, "shared_experts", None))
            assert (shared is None) == (block.moe.shared_experts is None)
            for theirs, ours in zip(
                [] if shared is None else shared.parameters(),
                [] if shared is None else block.moe.shared_experts.module.parameters(),
                strict=True,
            ):
                torch.testing.assert_close(comm.all_reduce(ours.grad.clone()), theirs.grad, **close)


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_taken_module_answers_and_learns_as_before(ranks: int) -> None:
    run_ranks(same, ranks)


class WithNorm(OldMixtral):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(D)


class Residual(Ungated):
    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(x)


class Dropping(Ungated):
    def forward(self, x: Tensor) -> Tensor:
        return F.dropout(super().forward(x), 0.3, self.training)


class Three(Ungated):
    def forward(self, x: Tensor) -> Any:
        return *self.summed(x), 1


def biased() -> nn.Module:
    module = OldMixtral()
    module.gate = nn.Linear(D, E)
    return module


def silent() -> nn.Module:
    module = OldMixtral()
    del module.top_k
    return module


def refused(rank: int) -> None:
    mesh = build_mesh(torch.device("cpu"))
    cases: tuple[tuple[Callable[[], nn.Module], str, dict[str, Any]], ...] = (
        (WithNorm, "not known: norm.weight", {}),
        (Residual, "something else than its gate", {}),
        (Dropping, "something else in training", {}),
        (Three, "more than its output", {}),
        (biased, "without a bias", {}),
        (silent, "give top_k=", {}),
        (lambda: nn.Linear(D, D), "neither a list nor stacked", {}),
        (lambda: nn.ModuleDict({"experts": nn.ModuleList()}), "empty", {}),
        (OldMixtral, "moves sequences", {"recipe": "netmoe"}),
        (OldMixtral, "from 1 to the 4 experts", {"top_k": 5}),
        (OldMixtral, "capacity_factor= is unknown", {"capacity_factor": 1.0}),
        (mixtral, "no bias for the choice", {"bias_update_rate": 0.1}),
        (lambda: OldMixtral().to("meta"), "meta device", {}),
    )
    for build, words, options in cases:
        with pytest.raises(UserError, match=words) as error:
            luffy.MoEBlock.from_module(build(), mesh, **options)
        assert "\n" not in str(error.value)
    block = luffy.MoEBlock.from_module(silent(), mesh, top_k=2, balance_loss=0.1)
    block(torch.randn(2, 3, D))
    assert float(block.aux_loss()) > 0
    with pytest.raises(UserError, match="not made by"):
        luffy.MoEBlock(D, W, E, mesh=mesh).copy_to(OldMixtral())
    bfloat = luffy.MoEBlock.from_module(made(qwen).bfloat16(), mesh)
    assert {p.dtype for p in bfloat.parameters()} == {torch.bfloat16}
    assert bfloat(torch.randn(6, D, dtype=torch.bfloat16)).shape == (6, D)


def test_what_cannot_be_taken_is_refused_in_a_line() -> None:
    run_ranks(refused, 1)


def unlike(rank: int) -> None:
    torch.manual_seed(rank)
    with pytest.raises(UserError, match="ranks hold different weights"):
        luffy.MoEBlock.from_module(OldMixtral(), build_mesh(torch.device("cpu")))


def test_ranks_with_other_weights_are_refused() -> None:
    run_ranks(unlike, 2)


def condensing_layers(rank: int) -> None:
    """Blocks that share the runtime of the first one, which knew of one layer; in training, tokens are condensed."""
    mesh, runtime, x = build_mesh(torch.device("cpu")), None, rows(4)
    recipe = replace(get_recipe("vanilla_dedup"), condense="paper")
    for layer in range(3):
        block = luffy.MoEBlock.from_module(made(Ungated), mesh, recipe=recipe, layer=layer, runtime=runtime)
        runtime = block.runtime
        x = block(x)
    assert x.isfinite().all()


def test_layers_made_one_by_one_may_condense() -> None:
    run_ranks(condensing_layers, 2)
