"""Folders in MXFP4 and fp8 are read as the numbers that they stand for, each rank its own experts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

pytest.importorskip("transformers")

from transformers import AutoModelForCausalLM

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf import load, save_pretrained
from luffy.hf.families import family_of
from luffy.hf.quantized import from_mxfp4
from luffy.testing import run_ranks

from .tiny import collate, random_rows, tiny_config, tiny_model

FAMILIES = ("gpt_oss", "deepseek_v3")


def quantize(folder: Path, method: str) -> None:
    """Write a folder as it is published: its experts (fp8: and attention) in few bits."""
    path = folder / "model.safetensors"
    tensors, out, generator = load_file(path), {}, torch.Generator().manual_seed(1)
    for name, tensor in tensors.items():
        if method == "mxfp4" and name.endswith(("gate_up_proj", "down_proj")):
            experts, inner, outer = tensor.shape
            shape = (experts, outer, inner // 32, 16)
            out[f"{name}_blocks"] = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
            out[f"{name}_scales"] = torch.randint(122, 126, shape[:3], generator=generator, dtype=torch.uint8)
        elif method == "fp8" and name.endswith("_proj.weight"):
            scale = 2 ** torch.randint(-3, 3, (2, 2), generator=generator).float()
            out[name] = (tensor / tensor.abs().max() * 8).to(torch.float8_e4m3fn)
            out[f"{name}_scale_inv"] = scale[: -(-tensor.shape[0] // 128), : -(-tensor.shape[1] // 128)].contiguous()
        else:
            out[name] = tensor
    save_file(out, path, metadata={"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": method}}))


def dequantized(quantised: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    out = {}
    for name, tensor in quantised.items():
        if name.endswith("_blocks"):
            scales = quantised[name.replace("_blocks", "_scales")]
            out[name.removesuffix("_blocks")] = convert_moe_packed_tensors(tensor, scales).float()
        elif tensor.dtype == torch.float8_e4m3fn:  # these are smaller than a block, which is 128 square
            out[name] = tensor.float() * quantised[f"{name}_scale_inv"]
        elif not name.endswith(("_scales", "_scale_inv")):
            out[name] = tensor
    return out


def through(rank: int, root: Path) -> list[list[float]]:
    mesh, found = build_mesh(torch.device("cpu")), []
    rows = random_rows(1, 4, 9)[2 * rank : 2 * rank + 2]
    for family in FAMILIES:
        parallel = load(root / family, mesh)
        found.append(parallel.logits(parallel.batch(**collate(rows, "right"))).flatten().tolist())
        save_pretrained(parallel, root / f"{family}-out")
    return found


def test_folders_of_few_bits_are_read_and_leave_whole(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"intermediate_size": 32}  # MXFP4 shares a scale among 32
    for family, method in zip(FAMILIES, ("mxfp4", "fp8"), strict=True):
        config = tiny_config(family, **(changes if family == "gpt_oss" else {}))
        tiny_model(config, torch.float32).save_pretrained(tmp_path / family)
        for copy in (tmp_path / family, tmp_path / f"{family}-plain"):
            tiny_model(config, torch.float32).save_pretrained(copy)
        quantize(tmp_path / family, method)
        values = dequantized(load_file(tmp_path / family / "model.safetensors"))
        save_file(values, tmp_path / f"{family}-plain" / "model.safetensors", metadata={"format": "pt"})
    found = run_ranks(through, 2, tmp_path)
    for i, family in enumerate(FAMILIES):
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-plain", attn_implementation="eager")
        after = AutoModelForCausalLM.from_pretrained(tmp_path / f"{family}-out", attn_implementation="eager")
        rows = random_rows(1, 4, 9)
        expected = torch.cat([plain(torch.tensor([tokens])).logits[0] for tokens, _ in rows]).flatten()
        got = torch.tensor(found[0][i] + found[1][i])
        assert torch.allclose(got, expected, atol=1e-3, rtol=1e-3), family
        assert getattr(after.config, "quantization_config", None) is None
        for name, weight in plain.state_dict().items():
            assert torch.allclose(weight, after.state_dict()[name], rtol=2**-8), name


def test_mxfp4_is_the_librarys() -> None:
    from transformers.integrations.mxfp4 import convert_moe_packed_tensors

    blocks = torch.randint(0, 256, (2, 6, 3, 16), dtype=torch.uint8)
    scales = torch.randint(100, 140, (2, 6, 3), dtype=torch.uint8)
    assert torch.equal(from_mxfp4(blocks, scales), convert_moe_packed_tensors(blocks, scales))


def test_other_methods_are_refused() -> None:
    config = tiny_config("mixtral")
    for method in ("gptq", "bitsandbytes"):
        config.quantization_config = {"quant_method": method}
        with pytest.raises(UserError, match=rf"quantized weights \({method}\) cannot be trained here; convert"):
            family_of(config)
