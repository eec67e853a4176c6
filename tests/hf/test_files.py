"""Folders in and out: plain transformers reads what was written, and what does not fit is refused by name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("transformers")

from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, Llama4Config, Qwen3_5MoeConfig

from luffy.comm import build_mesh
from luffy.errors import UserError
from luffy.hf import FAMILIES, files, load, save_pretrained
from luffy.hf.loading import fill
from luffy.testing import run_ranks
from luffy.train.rehoming import move_experts

from .tiny import FOUND_BY_STRUCTURE, collate, random_rows, tiny_config, tiny_model


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models as transformers writes them; `stacked` in its other format, `tied` with one weight for two."""
    root = tmp_path_factory.mktemp("models")
    for family in {*FAMILIES, *FOUND_BY_STRUCTURE}:
        tiny_model(tiny_config(family), torch.float32).save_pretrained(root / family)
    tied = tiny_model(tiny_config("olmoe", tie_word_embeddings=True), torch.float32)
    tied.tie_weights()
    tied.save_pretrained(root / "tied")
    tiny_model(tiny_config("mixtral"), torch.float32).save_pretrained(root / "stacked", save_original_format=False)
    text = [tiny_config(name).to_dict() for name in ("qwen3_5_moe_text", "llama4_text")]
    sees = {"hidden_size": 32, "intermediate_size": 24, "num_heads": 2, "depth": 1, "out_hidden_size": 32}
    torch.manual_seed(5)
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 128,
              "vision_output_dim": 32, "projector_input_dim": 32, "projector_output_dim": 32}  # fmt: skip
    for config in (Qwen3_5MoeConfig(text_config=text[0], vision_config=sees),
                   Llama4Config(text_config=text[1], vision_config=vision)):  # fmt: skip
        AutoModelForImageTextToText.from_config(config).save_pretrained(root / config.model_type)
    return root


SEEING = ("qwen3_5_moe", "llama4")


def plain(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", experts_implementation="eager")


def through(rank: int, root: Path, out: Path, names: list[str]) -> dict[str, list[str]]:
    """Load, let experts change places, save; the tensors that this rank read."""
    mesh, read = build_mesh(torch.device("cpu")), {}
    original = files.Checkpoint.read
    for name in names:
        seen: list[str] = []

        def noting(self: Any, key: str, *bounds: Any, seen: list[str] = seen) -> torch.Tensor:
            seen.append(key + (f"[{bounds[0]}:{bounds[1]}]" if bounds else ""))
            return original(self, key, *bounds)

        files.Checkpoint.read = noting  # type: ignore[method-assign]
        parallel = load(root / name, mesh)
        read[name] = seen
        optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
        for i, moe in enumerate(parallel.moe_layers):
            owner = torch.randperm(8, generator=torch.Generator().manual_seed(i)).numpy() // 4
            move_experts(moe, optimizer, owner, parallel.runtime.comm)
        rows = random_rows(1, 4, 9)[2 * rank : 2 * rank + 2]
        found = parallel.eval().logits(parallel.batch(**collate(rows, "right")))
        model = plain(root / name)
        expected = torch.cat([model(torch.tensor([tokens])).logits[0] for tokens, _ in rows])
        assert torch.allclose(found, expected, atol=2e-5), name
        save_pretrained(parallel, out / name, shard_num_bytes=60_000)
    return read


def test_what_goes_in_comes_out(folders: Path, tmp_path: Path) -> None:
    names = [*dict.fromkeys([*FAMILIES, *FOUND_BY_STRUCTURE]), "tied", "stacked", *SEEING]
    read = run_ranks(through, 2, folders, tmp_path, names)
    for name in names:
        before, after = plain(folders / name), plain(tmp_path / name)
        old, new = before.state_dict(), after.state_dict()
        assert old.keys() == new.keys()
        assert [k for k in old if not torch.equal(old[k], new[k])] == [], name
        ids = torch.arange(20)[None]
        # Tensors lie in memory as in their file, and products of equal ones that are aligned otherwise round otherwise.
        assert torch.allclose(before(ids).logits, after(ids).logits, rtol=1e-5, atol=1e-5), name
        assert not (tmp_path / f"{name}.tmp").exists()
        # The same tensors under the same names, if not in the same files (the stacked format becomes the usual one).
        # Of a model that sees, what comes out is its language model.
        if name in SEEING:
            assert after.config.model_type == f"{name}_text"
        elif name != "stacked":
            written = files.Checkpoint(tmp_path / name).entries
            original = files.Checkpoint(folders / name).entries
            assert {k: e.shape for k, e in written.items()} == {k: e.shape for k, e in original.items()}
    # Each rank read half of the experts, and nobody the other half.
    for rank, half in enumerate((range(4), range(4, 8))):
        mixtral = [key for key in read[rank]["mixtral"] if ".experts." in key]
        assert {int(key.split(".experts.")[1].split(".")[0]) for key in mixtral} == set(half)
        assert len(mixtral) == 3 * 4 * 3
        stacked = [key for key in read[rank]["gpt_oss"] if ".experts." in key]
        assert {key[key.index("[") :] for key in stacked} == {f"[{half[0]}:{half[-1] + 1}]"}


def renamed(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.2.mlp.experts.5.gate_projection.weight"] = tensors.pop(
        "model.layers.2.mlp.experts.5.gate_proj.weight"
    )
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return r"model\.layers\.2\.mlp\.experts\.5\.gate_proj\.weight is missing"


def truncated(folder: Path) -> str:
    path = folder / "model.safetensors"
    header = json.loads(path.read_bytes()[8:].split(b"}}", 1)[0] + b"}}")
    header.pop("__metadata__", None)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    path.write_bytes(path.read_bytes()[:-4])
    return rf"is truncated: {last} is not whole".replace(".", r"\.")


def beheaded(folder: Path) -> str:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:100])
    return "not a whole safetensors file"


def with_one_too_many(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.experts.8.up_proj.weight"] = torch.zeros(24, 32)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return r"experts\.8\.up_proj\.weight in .* belongs to nothing"


def of_another_shape(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.experts.0.down_proj.weight"
    tensors[name] = tensors[name][:, :-1].contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return r"experts\.0\.down_proj\.weight is \[32, 23\], and should be \[32, 24\]"


def missing_shard(folder: Path) -> str:
    tensors = load_file(folder / "model.safetensors")
    index = {"weight_map": dict.fromkeys(tensors, "model-00001-of-00001.safetensors")}
    (folder / files.INDEX).write_text(json.dumps(index))
    (folder / "model.safetensors").unlink()
    return r"model-00001-of-00001\.safetensors is missing; it holds lm_head\.weight"


def of_no_known_kind(folder: Path) -> str:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))
    return "model_type .llama. is not one of mixtral, qwen2_moe"


DAMAGES: list[Callable[[Path], str]] = [
    renamed, truncated, beheaded, with_one_too_many, of_another_shape, missing_shard, of_no_known_kind,
]  # fmt: skip


def refuse_all(rank: int, root: Path, patterns: list[str]) -> None:
    mesh = build_mesh(torch.device("cpu"))
    for damage, pattern in zip(DAMAGES, patterns, strict=True):
        with pytest.raises(UserError, match=pattern):
            load(root / damage.__name__, mesh)
    # A tensor of this rank's alone: the other rank is told as well.
    whole = load(root / "whole", mesh)
    checkpoint = files.Checkpoint(root / "whole")
    checkpoint.entries.pop("model.norm.weight")
    with pytest.raises(UserError, match=r"model\.norm\.weight is missing"):
        fill(whole, checkpoint)


def test_what_does_not_fit_is_refused_by_name(folders: Path, tmp_path: Path) -> None:
    patterns = []
    for damage in DAMAGES:
        shutil.copytree(folders / "olmoe", tmp_path / damage.__name__)
        patterns.append(damage(tmp_path / damage.__name__))
    shutil.copytree(folders / "olmoe", tmp_path / "whole")
    run_ranks(refuse_all, 2, tmp_path, patterns)


def run_snippet(rank: int, source: str, root: Path) -> None:
    given = collate(random_rows(rank, 3, 9), "left")
    exec(compile(source, "docs/huggingface.md", "exec"), given)
    assert given["logits"].shape == (int(given["attention_mask"].sum()), 61)


def test_the_example_of_the_documentation(folders: Path, tmp_path: Path) -> None:
    text = (Path(__file__).resolve().parents[2] / "docs" / "huggingface.md").read_text(encoding="utf-8")
    match = re.search(r"```python\n(import luffy.*?)```", text, re.DOTALL)
    assert match is not None
    source = match[1].replace("MODEL_FOLDER", str(folders / "olmoe")).replace("OUT_FOLDER", str(tmp_path / "out"))
    run_ranks(run_snippet, 2, source, folders)
    old, new = (plain(folder).state_dict() for folder in (folders / "olmoe", tmp_path / "out"))
    changed = [name for name in old if not torch.equal(old[name], new[name])]
    assert len(changed) == len(old), "one step of AdamW moves every tensor"


def save_in_vain(rank: int, root: Path, out: Path) -> None:
    """A folder that cannot be made; then a disk that one rank finds full while the others wait for its experts."""
    mesh = build_mesh(torch.device("cpu"))
    parallel = load(root / "gpt_oss", mesh)
    with pytest.raises(UserError, match=r"--out: /proc/model.tmp cannot be made"):
        save_pretrained(parallel, "/proc/model")
    if rank == 0:

        def full(*_: Any, **__: Any) -> None:
            raise OSError("No space left on device")

        files.save_file = full
    with pytest.raises(UserError, match=r"model-rank000-00001.safetensors not written: No space left"):
        save_pretrained(parallel, out / "model", shard_num_bytes=20_000)


def test_a_disk_that_takes_nothing_stops_all_ranks(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "old").write_text("what was there before")
    run_ranks(save_in_vain, 2, folders, tmp_path)
    assert [p.name for p in tmp_path.iterdir()] == ["model"], "nothing half-written, and the old folder as it was"
    assert (tmp_path / "model" / "old").exists()
