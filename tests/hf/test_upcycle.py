"""A dense model made into a Mixture-of-Experts computes what it did, in plain transformers and spread over ranks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM, LlamaConfig, Qwen3Config

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf import load
from luffy.hf.upcycle import upcycle
from luffy.testing import run_ranks
from luffy.train.cli import main

from .tiny import SMALL, collate, random_rows, tiny_model

DENSE = {name: value for name, value in SMALL.items() if name != "num_experts_per_tok"} | {"intermediate_size": 24}


def dense_config(kind: str) -> Any:
    if kind == "llama":
        return LlamaConfig(**DENSE, rope_parameters={"rope_type": "default", "rope_theta": 5e4})
    return Qwen3Config(**DENSE | {"tie_word_embeddings": True}, head_dim=16)


def spread(rank: int, folder: Path, logits: torch.Tensor) -> None:
    parallel = load(folder, build_mesh(torch.device("cpu")), "luffy")
    rows = random_rows(1, 4, 9)
    found = parallel.logits(parallel.batch(**collate(rows[2 * rank : 2 * rank + 2], "right")))
    first = sum(len(tokens) for tokens, _ in rows[: 2 * rank])
    torch.testing.assert_close(found, logits[first : first + len(found)], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("kind", "becomes"), [("llama", "mixtral"), ("qwen3", "qwen3_moe")])
def test_the_loss_is_the_same_at_first(tmp_path: Path, kind: str, becomes: str) -> None:
    dense = tiny_model(dense_config(kind), torch.float32)
    dense.tie_weights()
    dense.save_pretrained(tmp_path / "dense")
    main(
        [
            "upcycle",
            "--model",
            str(tmp_path / "dense"),
            "--experts",
            "4",
            "--top-k",
            "3",
            "--out",
            str(tmp_path / "moe"),
        ]
    )
    sparse: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", attn_implementation="eager")
    assert (sparse.config.model_type, sparse.config.num_experts_per_tok) == (becomes, 3)
    rows = random_rows(1, 4, 9)
    with torch.no_grad():
        expected = torch.cat([dense(torch.tensor([tokens])).logits[0] for tokens, _ in rows])
        found = torch.cat([sparse(torch.tensor([tokens])).logits[0] for tokens, _ in rows])
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    # Experts are copies; routers differ from expert to expert, so that these can part.
    block = sparse.model.layers[1].mlp
    assert torch.equal(block.experts.gate_up_proj[0], block.experts.gate_up_proj[3])
    assert float(block.gate.weight.detach().std()) == pytest.approx(0.02, rel=0.3)
    run_ranks(spread, 2, tmp_path / "moe", expected)


def test_what_has_no_counterpart_is_refused(tmp_path: Path) -> None:
    config = dense_config("llama")
    config.mlp_bias = True
    tiny_model(config, torch.float32).save_pretrained(tmp_path / "biased")
    with pytest.raises(UserError, match="mlp_bias"):
        upcycle(tmp_path / "biased", tmp_path / "out")
    with pytest.raises(UserError, match="--top-k 9"):
        upcycle(tmp_path / "biased", tmp_path / "out", top_k=9)
    (tmp_path / "out").mkdir()
    with pytest.raises(UserError, match="exists"):
        upcycle(tmp_path / "biased", tmp_path / "out")
