"""What is saved is what was trained: trained heads and embeddings, resized vocabularies, tied and untied, adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("peft")

from peft import LoraConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf import load, parallelize, save_pretrained
from luffy.hf.verify import ask, judge, opened_again
from luffy.testing import run_ranks
from luffy.train.gradients import GradientSync

from .tiny import collate, random_rows, tiny_config, tiny_model

ROWS = random_rows(3, 6, 12)


def lora(**changes: Any) -> LoraConfig:
    return LoraConfig(**{"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}
                      | changes)  # fmt: skip


CASES: dict[str, tuple[dict[str, Any], LoraConfig | None]] = {
    "head and embedding": ({}, lora(modules_to_save=["lm_head", "embed_tokens"])),
    "norm and router": ({}, lora(modules_to_save=["norm", "gate"])),
    "adapters": ({}, lora()),
    "tokens": ({}, lora(trainable_token_indices=[1, 2, 3])),
    "tied": ({"tie_word_embeddings": True}, None),
    "tied, head trained apart": ({"tie_word_embeddings": True}, lora(modules_to_save=["lm_head"])),
    "tied, embedding trained apart": ({"tie_word_embeddings": True}, lora(modules_to_save=["embed_tokens"])),
    "tied tokens": ({"tie_word_embeddings": True}, lora(trainable_token_indices=[1, 2, 3])),
    "more tokens": ({}, None),
    "more tokens, tied": ({"tie_word_embeddings": True}, None),
}


def made(name: str) -> Any:
    changes, adapter = CASES[name]
    model: Any = tiny_model(tiny_config("qwen3_moe", **changes), torch.float32)
    if changes:
        model.tie_weights()
    if name.startswith("more tokens"):
        torch.manual_seed(4)
        model.resize_token_embeddings(70)
    if adapter is None:
        return model
    torch.manual_seed(1)
    return get_peft_model(model, adapter)


def trained(rank: int, names: list[str], out: Path) -> dict[str, Any]:
    """Three steps of each, its folder written, and the logits of what was trained."""
    mesh, found = build_mesh(torch.device("cpu")), {}
    for i, name in enumerate(names):
        parallel = parallelize(made(name), mesh, "vanilla_dedup")
        sync = GradientSync(parallel, parallel.runtime.comm)
        optimizer = torch.optim.AdamW([p for p in parallel.parameters() if p.requires_grad], lr=0.05)
        for _ in range(3):
            batch = parallel.batch(**collate(ROWS[3 * rank : 3 * rank + 3], "right"))
            sync(batch).loss.backward()
            sync.finish()
            optimizer.step()
            optimizer.zero_grad()
        before = {n: p.detach().clone() for n, p in parallel.named_parameters()}
        found[name] = ask(parallel)[1].numpy()
        save_pretrained(parallel, out / str(i))
        assert all(torch.equal(p, before[n]) for n, p in parallel.named_parameters()), "saving changed a weight"
    return found


def test_the_folder_is_the_trained_model(tmp_path: Path) -> None:
    names = list(CASES)
    found = run_ranks(trained, 2, names, tmp_path)[0]
    for i, name in enumerate(names):
        model, info = AutoModelForCausalLM.from_pretrained(
            tmp_path / str(i), attn_implementation="eager", output_loading_info=True
        )
        assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), (name, info)
        assert model.config.tie_word_embeddings == (name in ("tied", "tied tokens", "more tokens, tied")), name
        vocabulary = model.config.vocab_size
        assert vocabulary == (70 if name.startswith("more tokens") else 61)
        tokens = torch.randint(0, vocabulary, (2, 12), generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            logits = model.eval()(tokens, use_cache=False).logits.flatten(0, 1)
        assert torch.allclose(logits, torch.from_numpy(found[name]), rtol=1e-3, atol=1e-4), name


def refused(rank: int, tmp_path: Path) -> None:
    mesh = build_mesh(torch.device("cpu"))
    model = get_peft_model(tiny_model(tiny_config("qwen3_moe"), torch.float32),
                           PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3))  # fmt: skip
    with pytest.raises(UserError, match="prompt_encoder"):
        save_pretrained(parallelize(model, mesh, "vanilla_dedup"), tmp_path / "prompt")
    parallel = parallelize(tiny_model(tiny_config("mixtral"), torch.float32), mesh)
    source = save_pretrained(parallel, tmp_path / "home" / "source")
    again = load(source, mesh)
    for folder in (source, source.parent):
        with pytest.raises(UserError, match="would replace its own input"):
            save_pretrained(again, folder)
    assert (source / "config.json").exists()


def test_what_cannot_be_saved_is_said(tmp_path: Path) -> None:
    run_ranks(refused, 1, tmp_path)


def checked(rank: int, tmp_path: Path) -> None:
    """A right folder passes; one whose expert is another's, or that lacks a tensor, does not, and is kept beside."""
    mesh = build_mesh(torch.device("cpu"))
    parallel = parallelize(tiny_model(tiny_config("mixtral"), torch.float32), mesh)
    save_pretrained(parallel, tmp_path / "right")
    right = AutoModelForCausalLM.from_pretrained(tmp_path / "right").state_dict()
    assert right["model.norm.weight"].numel() == 32
    wrong = parallel.library_name

    def misnamed(name: str) -> str:  # two attention maps change places on their way to the folder
        swap = {"q_proj": "o_proj", "o_proj": "q_proj"}
        return ".".join(swap.get(part, part) for part in wrong(name).split("."))

    parallel.library_name = misnamed  # type: ignore[method-assign]
    with pytest.raises(UserError, match=r"computes other logits .*kept as .*wrong.unverified"):
        save_pretrained(parallel, tmp_path / "wrong")
    assert not (tmp_path / "wrong").exists() and (tmp_path / "wrong.unverified" / "config.json").exists()
    save_pretrained(parallel, tmp_path / "wrong", verify=False)


@pytest.mark.slow
def test_a_folder_is_opened_again_before_it_gets_its_name(tmp_path: Path, verified: bool) -> None:
    run_ranks(checked, 2, tmp_path)


@pytest.mark.slow
def test_what_a_fresh_process_finds(tmp_path: Path, verified: bool) -> None:
    """Of a folder without its head, transformers makes one up, and says so; the judge listens."""
    model: Any = tiny_model(tiny_config("olmoe"), torch.float32)
    tokens = torch.arange(20).view(2, 10)
    state = {k: v for k, v in model.state_dict().items() if not k.startswith("lm_head")}
    model.save_pretrained(tmp_path / "m", state_dict=state)
    logits, loading = opened_again(tmp_path / "m", tokens)
    assert logits.shape == (20, 61) and loading["missing"] == ["lm_head.weight"]
    with pytest.raises(UserError, match=r"lm_head.weight is missing"):
        judge(tmp_path / "m", logits, logits, loading, rounded=True)
    fine: dict[str, Any] = {key: [] for key in ("missing", "unexpected", "mismatched")}
    judge(tmp_path / "m", logits, logits + 1e-6, fine, rounded=False)
    one_token = logits.clone()
    one_token[7] += 1
    for other, rounded in ((one_token, False), (torch.randn_like(logits), True), (logits * float("nan"), True)):
        with pytest.raises(UserError, match="computes other logits"):
            judge(tmp_path / "m", logits, other, fine, rounded)
    (tmp_path / "m" / "config.json").write_text("{}")
    with pytest.raises(UserError, match="cannot open"):
        opened_again(tmp_path / "m", tokens)
