"""Loss and every gradient equal the plain library's in one process, wherever sequences are computed."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any
from unittest.mock import patch

import pytest
import torch

pytest.importorskip("transformers")

from luffy.comm import Mesh, build_mesh
from luffy.errors import RankMismatchError, UserError
from luffy.hf import FAMILIES, parallelize
from luffy.hf.families import family_of
from luffy.hf.model import ParallelModel
from luffy.hf.structure import infer
from luffy.model.transformer import ModelOutput
from luffy.recipes import Recipe, get_recipe
from luffy.testing import RankFailedError, gather_full, run_ranks

from .tiny import FOUND_BY_STRUCTURE, collate, plain_loss, random_rows, tiny_config, tiny_model, wide

TOLERANCE = 1e-9
RANDOM = Recipe("random", "sequences anywhere", placement="random")
Rows = list[tuple[list[int], list[int]]]


@dataclass(frozen=True)
class Case:
    """One model on one batch; `rows[r]` are those of rank r. halves: as two micro-batches, `after` or `by turns`.

    steps: weights after a step of AdamW are compared too.
    """

    family: str
    recipe: Recipe
    side: str
    rows: list[Rows]
    padded: bool = False
    recompute: bool = False
    ep_size: int | None = None
    halves: str | None = None
    steps: bool = False
    changes: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        flags = f"padded={self.padded}, recompute={self.recompute}, halves={self.halves}"
        return f"{self.family}, {self.recipe.name}, {self.side}, {flags}"


@dataclass(frozen=True)
class Answer:
    loss: float
    gradients: dict[str, torch.Tensor]
    weights: dict[str, torch.Tensor]


def reference(case: Case) -> Answer:
    with wide():
        model = tiny_model(tiny_config(case.family, **case.changes))
        loss = plain_loss(model, [row for rows in case.rows for row in rows], case.side)
        loss.backward()
    grads = {n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()}
    if case.steps:
        adamw(model).step()
    return Answer(float(loss.detach()), grads, dict(model.named_parameters()) if case.steps else {})


def adamw(model: torch.nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)


def run_cases(rank: int, cases: list[Case], answers: list[Answer]) -> list[tuple[float, float, str, int]]:
    """For each case: relative errors of the loss and of the worst gradient, its name, and how many sequences moved."""
    meshes: dict[int | None, Mesh] = {}
    out = []
    for case, answer in zip(cases, answers, strict=True):
        if case.ep_size not in meshes:
            meshes[case.ep_size] = build_mesh(torch.device("cpu"), case.ep_size)
        mesh = meshes[case.ep_size]
        family_of(tiny_config(case.family))  # found by structure, if need be, in the library's own precision
        with wide():
            model = tiny_model(tiny_config(case.family, **case.changes))
            parallel = parallelize(model, mesh, case.recipe, recompute=case.recompute)
            loss = torch.stack([output.loss for output in outputs_of(parallel, case, case.rows[rank])]).sum()
            loss.backward()
        for p in parallel.parameters():
            if not p.requires_grad:  # ERNIE keeps the bias of its choice so
                p.grad = torch.zeros_like(p)
        loss = parallel.runtime.comm.all_reduce(loss.detach())
        found = {parallel.library_name(n): g for n, g in gather_full(parallel, "grad").items()}
        assert found.keys() == answer.gradients.keys()
        worst = max((error(g, answer.gradients[n]), n) for n, g in found.items())
        if case.steps:
            for name, p in parallel.named_parameters():
                p.grad = local_part_of(parallel, name, found[parallel.library_name(name)])
            adamw(parallel).step()
            weights = {parallel.library_name(n): p for n, p in gather_full(parallel).items()}
            worst = max(worst, max((error(p, answer.weights[n]), n) for n, p in weights.items()))
        planner = parallel.runtime.planner
        moved = 0 if planner is None else planner.tally.take().moved
        out.append((abs(float(loss) / answer.loss - 1), *worst, moved))
    return out


def error(found: torch.Tensor, wanted: torch.Tensor) -> float:
    return float((found - wanted).norm() / wanted.norm().clamp_min(1e-9))


def local_part_of(parallel: ParallelModel, name: str, whole: torch.Tensor) -> torch.Tensor:
    """Of a gradient: this rank's experts, or all."""
    own = parallel.get_parameter(name).shape
    first = parallel.runtime.comm.mesh.ep_rank * own[0] if own else 0
    return whole if whole.shape == own else whole[first : first + own[0]]


def outputs_of(parallel: ParallelModel, case: Case, rows: Rows) -> list[ModelOutput]:
    if case.halves is None:
        return [parallel(parallel.batch(**collate(rows, case.side), padded=case.padded))]
    middle = len(rows) // 2
    halves = [parallel.batch(**collate(r, case.side), padded=case.padded) for r in (rows[:middle], rows[middle:])]
    tokens, labels = sum(m.num_tokens for m in halves), sum(m.step_labels for m in halves)
    micros = [replace(m, step_tokens=tokens, step_labels=labels) for m in halves]
    return list(parallel(*micros)) if case.halves == "by turns" else [parallel(m) for m in micros]


def assert_exact(world: int, cases: list[Case]) -> None:
    results = run_ranks(run_cases, world, cases, [reference(c) for c in cases])[0]
    for case, (loss_error, grad_error, name, moved) in zip(cases, results, strict=True):
        assert loss_error < TOLERANCE, f"loss: {loss_error:.1e} ({case})"
        assert grad_error < TOLERANCE, f"gradient of {name}: {grad_error:.1e} ({case})"
        assert moved > 0 or case.recipe.placement == "stay", f"nothing moved: this shows little ({case})"


def dealt(seed: int, counts: list[int], longest: int = 12) -> list[Rows]:
    rows = random_rows(seed, sum(counts), longest)
    return [rows[sum(counts[:r]) : sum(counts[: r + 1])] for r in range(len(counts))]


def test_every_family_on_two_ranks() -> None:
    cases = []
    for i, family in enumerate([*FAMILIES, *FOUND_BY_STRUCTURE]):
        rows = dealt(i, [3, 4])
        cases += [
            Case(family, get_recipe("vanilla_dedup"), "right", rows, padded=True, steps=True),
            Case(family, get_recipe("luffy"), "left", rows, recompute=True),
            Case(family, RANDOM, "packed", dealt(10 + i, [5, 5])),
        ]
    cases += [Case("llama4_text", get_recipe(r), "right", dealt(30, [3, 4])) for r in ("vanilla", "janus", "netmoe")]
    for halves in ("after", "by turns"):
        cases += [
            Case("mixtral", get_recipe("luffy"), "left", dealt(20, [7, 6]), recompute=True, halves=halves),
            Case("deepseek_v3", RANDOM, "right", dealt(21, [6, 7]), halves=halves),
        ]
    assert_exact(2, cases)


@pytest.mark.slow
def test_four_ranks_one_of_them_empty_and_the_library_balance_loss() -> None:
    balance = {"output_router_logits": True, "router_aux_loss_coef": 0.3}
    cases = [
        Case("mixtral", get_recipe("vanilla"), "left", dealt(1, [2, 0, 3, 1]), changes=balance),
        Case("mixtral", get_recipe("luffy"), "right", dealt(2, [2, 0, 3, 1]), changes=balance),
        Case("deepseek_v3", get_recipe("netmoe"), "left", dealt(7, [3, 4, 3, 2]), recompute=True),
        Case("olmoe", RANDOM, "right", dealt(3, [1, 2, 0, 3]), padded=True, changes=balance),
        Case("deepseek_v3", RANDOM, "right", dealt(4, [2, 3, 0, 2]), recompute=True),
        Case("qwen3_moe", get_recipe("fastermoe"), "right", dealt(5, [2, 1, 2, 0]), changes=balance),
        Case("gpt_oss", get_recipe("janus"), "right", dealt(6, [2, 1, 2, 0])),
        Case("deepseek_v3", RANDOM, "right", dealt(8, [4, 3, 4, 1]), ep_size=2),
    ]
    assert_exact(4, cases)


def test_structure_finds_what_is_described() -> None:
    for name, family in FAMILIES.items():
        config = tiny_config(name)
        if family.biases or name == "phimoe":
            continue
        found = infer(config)
        for setting in ("num_experts", "top_k", "expert_width"):
            assert getattr(config, getattr(found, setting)) == getattr(config, getattr(family, setting)), name
        for part in ("block", "gate", "shared", "shared_gate", "score", "bias_buffer", "on_disk"):
            assert getattr(found, part) == getattr(family, part), (name, part)
        assert found.normalizes(config) == family.normalizes(config) and set(found.attention) <= set(family.attention)


def test_another_build_is_refused_not_guessed() -> None:
    from transformers import FlexOlmoConfig, GptOssConfig, PhimoeConfig

    small = {n: v for n, v in tiny_config("mixtral").to_dict().items() if n in ("hidden_size", "vocab_size")}
    sizes = small | {
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
    }
    for config, why in (
        (PhimoeConfig(**sizes, num_local_experts=8), "converted in a way that is not known"),
        (FlexOlmoConfig(**sizes, num_experts=8, pad_token_id=None, eos_token_id=None), "cannot be tried"),
        (GptOssConfig(**sizes, num_local_experts=8, head_dim=8), "not two stacked weights"),
    ):
        with pytest.raises(UserError, match=f"'{config.model_type}' is not one of mixtral.*{why}"):
            infer(config)
    # A factor on what is added to the stream is seen by its result.
    config = tiny_config("qwen3_moe")
    config.model_type = "qwen3_moe"
    with (
        patch("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeMLP.forward", autospec=True),
        patch("transformers.models.qwen3_moe.modeling_qwen3_moe.Qwen3MoeSparseMoeBlock.forward", lambda self, x: 2 * x),
        pytest.raises(UserError, match="something else than the sum of its parts"),
    ):
        infer(config)  # fmt: skip


def ask_what_cannot_be(rank: int) -> None:
    mesh = build_mesh(torch.device("cpu"))
    with pytest.raises(UserError, match=r"--recipe lsh_moe: llama4_text weighs .*--condense none"):
        parallelize(tiny_model(tiny_config("llama4_text")), mesh, "lsh_moe")
    with pytest.raises(UserError, match="sliding_window of minimax"):
        parallelize(tiny_model(tiny_config("minimax", sliding_window=4)), mesh)
    parallel = parallelize(tiny_model(tiny_config("phimoe")), mesh)
    assert parallel.config.max_sequence_length == 16
    with pytest.raises(UserError, match=r"--sequence-length: a sequence of 17 tokens; .*longrope"):
        parallel(parallel.batch(torch.arange(17)[None], labels=torch.arange(17)[None]))
    with pytest.raises(UserError, match="input_jitter_noise"):
        parallelize(tiny_model(tiny_config("phimoe", input_jitter_noise=0.1)), mesh)


def test_what_a_family_cannot_do_is_one_line() -> None:
    run_ranks(ask_what_cannot_be, 1)


def adapted(config: Any) -> torch.nn.Module:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny_model(config), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                p.copy_(0.2 * torch.randn(p.shape, generator=generator))
    return model.double()


def run_adapted_and_half(rank: int, rows: list[Rows], gradients: dict[str, torch.Tensor], logits: torch.Tensor) -> Any:
    mesh = build_mesh(torch.device("cpu"))
    with wide():
        model = adapted(tiny_config("mixtral"))
        model.gradient_checkpointing_enable()
        parallel = parallelize(model, mesh, "luffy")
        assert parallel.runtime.recompute, "gradient checkpointing of the model is taken over"
        parallel(parallel.batch(**collate(rows[rank], "right"))).loss.backward()
    with_gradient = {n: p.grad for n, p in parallel.named_parameters() if p.grad is not None}
    assert with_gradient.keys() == {n for n, p in parallel.named_parameters() if p.requires_grad}
    worst = 0.0
    for name, grad in with_gradient.items():
        expected = gradients[name.removeprefix("library.")]
        parallel.runtime.comm.all_reduce(grad)
        worst = max(worst, float((grad - expected).norm() / expected.norm()))
    assert len(with_gradient) == len(gradients) == 12
    assert worst < TOLERANCE

    # Rows in half the bits, weights in float32: near the library's own answers, gradients in the weights' dtype.
    model = tiny_model(tiny_config("qwen3_moe"), torch.float32)
    parallel = parallelize(model, mesh, "luffy", stream_dtype=torch.bfloat16)
    micro = parallel.batch(**collate(rows[rank], "right"))
    found = parallel.logits(micro)
    assert found.dtype == torch.bfloat16
    first = sum(len(tokens) for r in rows[:rank] for tokens, _ in r)
    expected = logits[first : first + len(found)]
    errors = (found - expected).norm(dim=1) / expected.norm(dim=1)
    assert float(errors.median()) < 0.03, "by row: a token that chose otherwise by a hair is no fault"
    parallel(micro).loss.backward()
    assert {p.grad.dtype for p in parallel.parameters()} == {torch.float32}

    # Adapters over frozen weights in half the bits are float32 themselves, and learn.
    half = parallelize(tiny_model(tiny_config("qwen3_moe"), torch.bfloat16), mesh, "luffy")
    half.adapt(2)
    half(half.batch(**collate(rows[rank], "right"))).loss.backward()
    learning = {n: p for n, p in half.named_parameters() if p.requires_grad}
    assert len(learning) == 2 * 4 * 3 and all(".lora_" in n for n in learning)
    assert {p.dtype for p in learning.values()} == {torch.float32}
    assert {p.dtype for p in half.parameters() if not p.requires_grad} == {torch.bfloat16}
    assert all(bool(p.grad.any()) for n, p in learning.items() if ".lora_B." in n)

    # The library's own model no longer knows where its rows are, and says so.
    with pytest.raises(UserError, match="call the parallel model"):
        parallel.library(input_ids=micro.tokens[None])

    # Loss-free balancing moves the bias that the library adds for the choice.
    balanced = parallelize(tiny_model(tiny_config("deepseek_v3")), mesh, bias_update_rate=0.1)
    router = balanced.moe_layers[0].router
    before = router.gate.e_score_correction_bias.clone()
    router.raise_bias(torch.arange(8.0))
    assert torch.equal(router.gate.e_score_correction_bias, before + torch.arange(8.0))

    # Ranks that built other weights are told so, and what cannot be run is refused in one line.
    with pytest.raises(RankMismatchError, match=r"embed_tokens"):
        parallelize(tiny_model(tiny_config("olmoe"), seed=rank), mesh)
    with pytest.raises(UserError, match="router_jitter_noise"):
        parallelize(tiny_model(tiny_config("mixtral", router_jitter_noise=0.1)), mesh)
    with pytest.raises(UserError, match="bias-update-rate"):
        parallelize(tiny_model(tiny_config("olmoe")), mesh, bias_update_rate=0.1)


def test_adapters_checkpointing_half_precision_and_refusals() -> None:
    rows = dealt(7, [3, 3])
    everything = [row for part in rows for row in part]
    with wide():
        model = adapted(tiny_config("mixtral"))
        plain_loss(model, everything, "right").backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    plain = tiny_model(tiny_config("qwen3_moe"), torch.float32)
    with torch.no_grad():
        logits = torch.cat([plain(torch.tensor([tokens])).logits[0] for tokens, _ in everything])
    run_ranks(run_adapted_and_half, 2, rows, gradients, logits)


def ask_too_much(rank: int) -> None:
    parallelize(tiny_model(tiny_config("mixtral")), build_mesh(torch.device("cpu")))


def test_experts_must_divide() -> None:
    with pytest.raises(RankFailedError, match="--experts 8 cannot be divided over 3"):
        run_ranks(ask_too_much, 3)
