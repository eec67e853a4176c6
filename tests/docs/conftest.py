"""A desk to try documented commands on: what their placeholders stand for, and runs that they expect to be there."""

import json
from dataclasses import dataclass

import pytest

from luffy.train.options import TrainOptions
from luffy.train.runfile import write_run_file
from tests.train.test_plan_command import save_trace

# What the scripts of a page call their variables.
VARIABLES = {"$NNODES": "2", "$NODE_RANK": "0", "$GPUS": "8", "$MASTER_ADDR": "10.0.0.1", "$MASTER_PORT": "29500",
             "$INTERFACE": "eth1", "$OUT": "runs/node", "$SLURM_NNODES": "2", "$SLURM_NODEID": "0"}  # fmt: skip
DOTS = {  # what three dots stand for
    "compare": ("--recipes", "vanilla,luffy", "--out", "runs/dots"),
    "finetune": ("--model", "HF_FOLDER", "--data", "chats.jsonl", "--out", "runs/dots"),
    "plan": ("--trace", "runs/mine", "--topology", "2:intra=1gbit"),
}


@dataclass(frozen=True)
class Desk:
    given: dict[str, str]

    def fill(self, words: tuple[str, ...], abridged: bool = False) -> list[str]:
        dots = DOTS.get(words[0], ()) if abridged else ()
        filled = [words[0], *dots, *(w for w in words[1:] if w != "$@")]
        return [self.given.get(word, word).replace("/shared/", "runs/") for word in filled]


@pytest.fixture
def desk(corpus, tmp_path, monkeypatch) -> Desk:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", corpus["cache_dir"])
    data = dict.fromkeys(("FOLDER", "chats.jsonl", "$DATA", "/shared/corpus"), corpus["data"])
    for name in ("moe", "dense"):
        (tmp_path / "models" / name).mkdir(parents=True)  # `weights` fills them
    moe = dict.fromkeys(("HF_FOLDER", "MODEL_FOLDER"), str(tmp_path / "models" / "moe"))
    return Desk(VARIABLES | data | moe | {"DENSE_FOLDER": str(tmp_path / "models" / "dense")})


@pytest.fixture
def weights(desk) -> None:
    """The desk's models as transformers saves them, with tokenizers."""
    pytest.importorskip("transformers")
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    from tests.hf.tiny import SMALL, tiny_config, tiny_model, tiny_tokenizer

    tiny_model(tiny_config("mixtral", vocab_size=97), torch.float32).save_pretrained(desk.given["HF_FOLDER"])
    small = {n: v for n, v in SMALL.items() if n != "num_experts_per_tok"} | {"vocab_size": 97}
    LlamaForCausalLM(LlamaConfig(**small, intermediate_size=24)).save_pretrained(desk.given["DENSE_FOLDER"])
    for name in ("HF_FOLDER", "DENSE_FOLDER"):
        tiny_tokenizer().save_pretrained(desk.given[name])


@pytest.fixture
def runs(desk, other_system, tmp_path) -> None:
    """What an earlier command of a page would have left in runs/."""
    for name in ("mine", "traced"):
        save_trace(tmp_path / "runs" / name, steps=2, sequences=16)
    write_run_file(TrainOptions(data=desk.given["FOLDER"], out=str(tmp_path / "runs" / "mine")))


@pytest.fixture
def other_system(tmp_path) -> None:
    """A run of another system, in two small files."""
    folder = tmp_path / "runs" / "other-system"
    folder.mkdir(parents=True)
    parts = dict.fromkeys(("dispatch", "combine", "dispatch_backward", "combine_backward"), 10)
    records = [{"step": n, "loss": 3.0, "tokens": 64, "seconds": 0.1, "bytes": parts} for n in (1, 2)]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    (folder / "summary.json").write_text(json.dumps({"recipe": "another", "steps": 2, "valid_loss": 3.0}))
