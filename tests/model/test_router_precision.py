"""Routers choose in float32 at least: under autocast, in bfloat16 models, from folders that store bfloat16."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import luffy
from luffy.comm import build_mesh
from luffy.config import RouterConfig
from luffy.data.batch import Layout, SequenceTable
from luffy.hf.families import FAMILIES
from luffy.hf.loading import load
from luffy.hf.saving import save_pretrained
from luffy.model.layers import LayerNorm, RMSNorm
from luffy.model.library import LibraryRouter
from luffy.model.router import Router, RouterBase
from luffy.testing import run_ranks
from tests.hf.tiny import tiny_config, tiny_model, tiny_tokenizer

WIDTH, EXPERTS, ROWS = 32, 8, 40
HF = ("mixtral", "qwen3_moe", "olmoe", "deepseek_v3", "glm4_moe", "qwen2_moe", "gpt_oss")


def gate_of(family: str) -> RouterBase:
    model = tiny_model(tiny_config(family), torch.float32)
    known = FAMILIES[family]
    block = next(getattr(x, known.block) for x in model.model.layers if known.is_sparse(x))  # type: ignore[union-attr]
    gate = getattr(block, known.gate)
    with torch.no_grad():  # as a folder in bfloat16 has it
        for t in [*gate.parameters(), *gate.buffers()]:
            t.copy_(t.bfloat16())
    score = known.score
    return LibraryRouter(gate, RouterConfig(EXPERTS, 2, score=score, bias_update_rate=0.001), known.bias_buffer)


def own(score: str) -> RouterBase:
    router = Router(RouterConfig(EXPERTS, 2, score=score, bias_update_rate=0.001), WIDTH)
    with torch.no_grad():
        nn.init.normal_(router.weight, std=0.2, generator=torch.Generator().manual_seed(1))
        router.weight.copy_(router.weight.bfloat16())
        router.choice_bias.copy_(torch.linspace(-0.1, 0.1, EXPERTS))
    return router


@pytest.mark.parametrize("name", [*HF, "softmax", "sigmoid"])
def test_logits_and_weights_are_wide(name: str) -> None:
    router = own(name) if name in ("softmax", "sigmoid") else gate_of(name)
    x = torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2)).bfloat16()
    layout = Layout(SequenceTable(np.array([ROWS]), np.array([0])), 0, x.device)
    slots = torch.arange(router.config.num_experts)
    wide_logits, wide_scores, wide_ids = router.choose(x.float())
    wide_weights = router(x.float(), layout, slots)[0].topk_weights
    assert wide_logits.dtype == torch.float32 == wide_weights.dtype

    def same(case: RouterBase) -> None:
        logits, scores, ids = case.choose(x)
        weights = case(x, layout, slots)[0].topk_weights
        for a, b in ((logits, wide_logits), (scores, wide_scores), (ids, wide_ids), (weights, wide_weights)):
            assert a.dtype == b.dtype and torch.allclose(a, b, rtol=1e-6, atol=1e-7)

    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(router)
    narrow = router.to(torch.bfloat16)
    assert all(p.dtype == torch.bfloat16 for p in narrow.parameters())
    assert all(b.dtype == torch.float32 for b in narrow.buffers())
    same(narrow)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        same(narrow)
    if name not in ("deepseek_v3", "glm4_moe"):  # the library's own code says float32 there
        assert narrow.double().choose(x.double())[0].dtype == torch.float64


@pytest.mark.parametrize("convert", [nn.Module.bfloat16, nn.Module.half, lambda m: m.to("cpu", torch.bfloat16)])
def test_a_bias_keeps_what_narrow_types_would_round_away(convert: object) -> None:
    router = own("sigmoid")
    with torch.no_grad():
        router.choice_bias.fill_(1.0 + 2.0**-12)  # type: ignore[union-attr,operator]
    convert(nn.Sequential(router))  # type: ignore[operator]
    assert (router.choice_bias == 1.0 + 2.0**-12).all()
    for _ in range(10):
        router.raise_bias(torch.full((EXPERTS,), 0.001))
    assert torch.allclose(router.choice_bias, torch.tensor(1.0 + 2.0**-12 + 0.01), atol=1e-6)  # type: ignore[arg-type]


@pytest.mark.parametrize("norm", [LayerNorm(WIDTH), RMSNorm(WIDTH, eps=1e-6)])
def test_norms_of_a_narrow_model_have_wide_statistics(norm: nn.Module) -> None:
    x = (3 + torch.randn(ROWS, WIDTH, generator=torch.Generator().manual_seed(2))).bfloat16()
    expected = norm(x.float()).bfloat16()
    assert torch.equal(norm.bfloat16()(x), expected)


def from_bfloat16(rank: int, folder: Path, out: Path) -> list[Tensor]:
    mesh = build_mesh(torch.device("cpu"))
    parallel = load(folder, mesh, bias_update_rate=0.001)
    gates = [moe.router for moe in parallel.moe_layers]
    before = [r.gate.e_score_correction_bias.clone() for r in gates]  # type: ignore[union-attr,operator]
    assert all(b.dtype == torch.float32 for b in before)
    for router in gates:
        for _ in range(10):
            router.raise_bias(torch.full((EXPERTS,), 0.001))
    save_pretrained(parallel, out)
    again = load(out, mesh)
    return [
        (moe.router.gate.e_score_correction_bias - b).numpy()  # type: ignore[union-attr,operator]
        for moe, b in zip(again.moe_layers, before, strict=True)
    ]


@pytest.mark.slow
def test_a_folder_that_stores_the_bias_in_bfloat16(tmp_path: Path) -> None:
    model = tiny_model(tiny_config("glm4_moe", vocab_size=97), torch.bfloat16)
    for layer in model.model.layers[1:]:  # type: ignore[union-attr,index]
        layer.mlp.gate.e_score_correction_bias = layer.mlp.gate.e_score_correction_bias.float().fill_(5.0).bfloat16()
    model.save_pretrained(tmp_path / "in")  # type: ignore[operator]
    tiny_tokenizer().save_pretrained(tmp_path / "in")
    for moved in run_ranks(from_bfloat16, 1, tmp_path / "in", tmp_path / "out")[0]:
        assert np.allclose(moved, 0.01, atol=1e-5)


def under_autocast(rank: int) -> None:
    """A block under autocast chooses as without, and answers in its input's dtype."""
    mesh = build_mesh(torch.device("cpu"))
    block = luffy.MoEBlock(WIDTH, 16, EXPERTS, mesh=mesh)
    x = torch.randn(2, 20, WIDTH, generator=torch.Generator().manual_seed(5))
    seen = []
    block.moe.router.register_forward_hook(lambda module, args, out: seen.append(out[0]))
    plain = block(x)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cast = block(x)
    assert cast.dtype == x.dtype
    assert torch.equal(seen[0].topk_expert_ids, seen[1].topk_expert_ids)
    assert torch.equal(seen[0].topk_weights, seen[1].topk_weights)
    assert torch.allclose(cast, plain, atol=0.05)


def test_a_block_under_autocast() -> None:
    run_ranks(under_autocast, 2)
