"""LoRA on experts, routers and attention, DoRA: as PEFT computes them in one process, and in files that PEFT reads."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf import parallelize, save_adapter, save_pretrained
from luffy.hf.memory import memory_line, needed_bytes
from luffy.testing import run_ranks
from luffy.train.gradients import make_optimizer
from luffy.train.rehoming import move_experts

from .tiny import collate, random_rows, tiny_config, tiny_model, wide

ROWS = random_rows(3, 7, 12)
STACKED = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@dataclass(frozen=True)
class Case:
    name: str
    family: str
    recipe: str
    lora: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("experts", "qwen3_moe", "luffy", {"target_parameters": STACKED}),
    Case("down_alone_guests", "mixtral", "janus", {"target_parameters": STACKED[1:]}),
    Case("transposed_with_biases", "gpt_oss", "vanilla_dedup", {"target_parameters": STACKED}),
    # PEFT knows the usual list as the stacked experts', with twice the rank for gate and up together.
    Case("list", "deepseek_v3", "luffy", {"target_modules": ["o_proj", "gate_proj", "up_proj", "down_proj"]}),
    Case("router_and_dora_free", "qwen3_moe", "vanilla", {"target_parameters": ["mlp.gate.weight", STACKED[0]]}),
    Case("weighed_input", "llama4_text", "vanilla_dedup",
         {"target_parameters": [s.replace("mlp", "feed_forward") for s in STACKED]}),
    Case("scaled", "granitemoe", "luffy",
         {"target_parameters": ["block_sparse_moe.router.weight", "block_sparse_moe.experts.down_proj"]}),
    Case("dora", "qwen3_moe", "luffy", {"use_dora": True}),
]  # fmt: skip


def built(case: Case) -> Any:
    torch.manual_seed(1)
    settings = {"r": 3, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"} | case.lora
    model = get_peft_model(tiny_model(tiny_config(case.family)), LoraConfig(**settings), autocast_adapter_dtype=False)
    return filled(model, "lora_B")


def filled(model: Any, which: str) -> Any:
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            if which in name:
                p.copy_(0.3 * torch.randn(p.shape, generator=generator))
    return model.double()


def reference(case: Case) -> tuple[float, dict[str, torch.Tensor], torch.Tensor]:
    with wide():
        model = built(case)
        out = model(**collate(ROWS, "right"), use_cache=False)
        out.loss.backward()
        return float(out.loss.detach()), _gradients(model), _logits_of(model.eval())


def _gradients(model: Any) -> dict[str, torch.Tensor]:
    named = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    found: dict[str, torch.Tensor] = get_peft_model_state_dict(model, named, save_embedding_layers=False)
    return found


def _logits_of(model: Any) -> torch.Tensor:
    """Of every token of the rows, one after the other."""
    with torch.no_grad():
        return torch.cat([model(input_ids=torch.tensor([tokens])).logits[0] for tokens, _ in ROWS])


def run_cases(rank: int, folder: Path, wanted: list[tuple[float, dict[str, torch.Tensor], torch.Tensor]]) -> None:
    mesh = build_mesh(torch.device("cpu"))
    mine = ROWS[:3] if rank == 0 else ROWS[3:]
    for case, (loss, gradients, _) in zip(CASES, wanted, strict=True):
        with wide():
            parallel = parallelize(built(case), mesh, case.recipe)
            comm = parallel.runtime.comm
            out = parallel(parallel.batch(**collate(mine, "right"))).loss
            out.backward()
        assert float(comm.all_reduce(out.detach())) == pytest.approx(loss, rel=1e-10), case

        # Saved as if they were the adapter, gradients have PEFT's names and shapes.
        trained = {n: p for n, p in parallel.named_parameters() if p.requires_grad}
        weights = {n: p.data for n, p in trained.items()}
        for name, p in trained.items():
            p.data = torch.zeros_like(p) if p.grad is None else p.grad
            if ".experts.lora_" not in name:
                comm.all_reduce(p.data)
        save_adapter(parallel, folder / case.name / "gradients")
        for name, p in trained.items():
            p.data = weights[name]
        found = load_file(folder / case.name / "gradients" / "adapter_model.safetensors")
        assert found.keys() == gradients.keys(), case
        for name, gradient in found.items():
            assert float((gradient - gradients[name]).norm() / gradients[name].norm()) < 1e-9, (case, name)
        # Experts live elsewhere by the time that they are saved.
        move_experts(parallel.moe_layers[0], make_optimizer(parallel, 0.1, 0, False), np.array([1, 0] * 4), comm)
        save_adapter(parallel, folder / case.name / "adapter")
        with wide():
            save_pretrained(parallel, folder / case.name / "model")


def opened(folder: Path) -> Any:
    options = {"attn_implementation": "eager", "experts_implementation": "eager"}
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()


def test_peft_computes_the_same_and_opens_what_is_saved(tmp_path: Path) -> None:
    wanted = [reference(case) for case in CASES]
    run_ranks(run_cases, 2, tmp_path, wanted)
    for case, (_, _, logits) in zip(CASES, wanted, strict=True):
        with wide():
            plain = tiny_model(tiny_config(case.family)).eval()
            before = _logits_of(plain)
            adapted = PeftModel.from_pretrained(plain, str(tmp_path / case.name / "adapter")).double().eval()
            found, merged = _logits_of(adapted), _logits_of(adapted.merge_and_unload())
            whole = _logits_of(opened(tmp_path / case.name / "model"))
        assert float((before - logits).abs().max()) > 0.05, "the adapter does something"
        for what in (found, merged, whole):
            assert torch.allclose(what, logits, rtol=0, atol=1e-9), case


def adapt_in_place(rank: int, folder: Path) -> list[Any]:
    mesh = build_mesh(torch.device("cpu"))
    mine = ROWS[:3] if rank == 0 else ROWS[3:]
    parallel = parallelize(tiny_model(tiny_config("qwen3_moe"), torch.bfloat16), mesh, "luffy")
    move_experts(
        parallel.moe_layers[0], make_optimizer(parallel, 0.1, 0, False), np.array([1, 0] * 4), parallel.runtime.comm
    )
    parallel.adapt(4, on=("attention", "experts", "router"))
    learning = {n: p for n, p in parallel.named_parameters() if p.requires_grad}
    need = needed_bytes(parallel, 100)
    assert need["weights"] == sum(p.nbytes for p in parallel.parameters())
    assert need["moments"] == 2 * need["gradients"] == 2 * sum(4 * p.numel() for p in learning.values())
    line = memory_line(parallel, 100)
    assert line.startswith("memory a rank: weights") and "--recompute" in line and "--lora" not in line
    many, few = (needed_bytes(parallel, n)["activations"] for n in (4000, 2000))
    assert many > 1.5 * few
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert sum(".experts.lora_" in n for n in learning) == 2 * 4 and sum(".router." in n for n in learning) == 2 * 2
    parallel(parallel.batch(**collate(mine, "right"))).loss.backward()
    assert all(bool(p.grad.any()) for n, p in learning.items() if "lora_B" in n)
    with torch.no_grad():
        for name, p in learning.items():
            if "lora_B" in name:
                p.normal_(generator=torch.Generator().manual_seed(len(name)))
                p.copy_(p.bfloat16())
    save_adapter(parallel, folder / "adapter")
    save_pretrained(parallel, folder / "model", dtype=torch.float32)
    for wrong in ({"on": ("mlp",)}, {"on": ("experts",), "dora": True}):
        with pytest.raises(UserError, match="--lora-on"):
            parallel.adapt(4, **wrong)
    alone = parallelize(tiny_model(tiny_config("qwen3_moe"), torch.float32), mesh, "luffy")
    alone.adapt(2, on=("experts",))
    for name, p in alone.named_parameters():
        assert p.requires_grad == (".experts.lora_" in name)
        if "lora_B" in name:
            p.data.normal_(generator=torch.Generator().manual_seed(len(name)))
    save_adapter(alone, folder / "alone")
    save_pretrained(alone, folder / "alone-model")
    return parallel.moe_layers[0].experts.lora_A["down_proj"].tolist()


def test_adapters_made_in_place_are_pefts_own(tmp_path: Path) -> None:
    first, second = run_ranks(adapt_in_place, 2, tmp_path)
    assert first != second, "every expert has its own"
    plain = tiny_model(tiny_config("qwen3_moe"), torch.bfloat16).float()
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "adapter")).merge_and_unload().state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "model", dtype=torch.float32).state_dict()
    for name, weight in adapted.items():
        if "gate.weight" in name or "experts" in name or "self_attn" in name:
            assert torch.allclose(weight, saved[name], rtol=2**-7, atol=2**-7), name
    plain = tiny_model(tiny_config("qwen3_moe"), torch.float32)
    adapted = PeftModel.from_pretrained(plain, str(tmp_path / "alone")).merge_and_unload().state_dict()
    saved = AutoModelForCausalLM.from_pretrained(tmp_path / "alone-model", dtype=torch.float32).state_dict()
    assert all(torch.allclose(weight, saved[name], rtol=1e-5, atol=1e-6) for name, weight in adapted.items())
