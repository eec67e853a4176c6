"""A saved folder as others will see it: opened by plain transformers in a process of its own, and asked for logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from luffy.errors import UserError
from luffy.hf.model import ParallelModel

ROWS, LENGTH = 2, 12
SCRIPT = Path(__file__).with_name("opened.py")
# Relative error of a token's logits. Weights that are rounded when they are stored, or a stream in 16 bits, move them
# by a few percent, and a near tie between experts can fall the other way at a token; a weight that is not what was
# trained changes them all by about their own size.
EXACT, ROUNDED = 1e-3, 0.25
_LEFT_OUT = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


@torch.no_grad()
def ask(parallel: ParallelModel) -> tuple[Tensor, Tensor]:
    """One batch and what the model that was trained says to it: tokens [B, L], logits [B * L, V]. All ranks call it."""
    vocabulary = parallel.causal_lm.config.vocab_size
    length = min(LENGTH, parallel.config.max_sequence_length)
    tokens = torch.randint(0, vocabulary, (ROWS, length), generator=torch.Generator().manual_seed(0))
    training = parallel.training
    parallel.eval()
    try:
        logits = parallel.logits(parallel.batch(tokens.to(parallel.runtime.comm.mesh.device)))
    finally:
        parallel.train(training)
    return tokens, logits.float().cpu()


def opened_again(folder: Path, tokens: Tensor) -> tuple[Tensor, dict[str, Any]]:
    """Logits [B * L, V] of the folder in a fresh process of plain transformers, and what that did not find there.

    Raises UserError with its last line where it cannot open the folder.
    """
    environment = {k: v for k, v in os.environ.items() if k not in _LEFT_OUT and not k.startswith("TORCHELASTIC")}
    with tempfile.TemporaryDirectory() as place:
        question, answer = Path(place) / "question.safetensors", Path(place) / "answer.safetensors"
        save_file({"tokens": tokens}, question)
        done = subprocess.run(
            [sys.executable, "-P", str(SCRIPT), str(folder), str(question), str(answer)],
            env=environment | {"CUDA_VISIBLE_DEVICES": ""}, capture_output=True, text=True, check=False,
        )  # fmt: skip
        if done.returncode:
            words = (done.stderr.strip().splitlines() or ["no reason given"])[-1][:300]
            raise UserError(f"plain transformers cannot open {folder}: {words}")
        with safe_open(answer, framework="pt") as file:
            return file.get_tensor("logits").flatten(0, 1), json.loads(file.metadata()["found"])


def judge(folder: Path, expected: Tensor, found: Tensor, loading: dict[str, Any], rounded: bool) -> None:
    """UserError if the folder is not the model that was trained. Logits: [T, V] each."""
    for what, words in (("missing", "is missing"), ("mismatched", "has another shape"), ("unexpected", "is unknown")):
        if loading[what]:
            raise UserError(f"{folder}: to plain transformers {loading[what][0]} {words}")
    if found.shape != expected.shape:
        raise UserError(f"{folder}: logits {list(found.shape)} in plain transformers, trained {list(expected.shape)}")
    error = (found - expected).norm(dim=-1) / expected.norm(dim=-1).clamp_min(1e-12)
    typical, most = float(error.median()), ROUNDED if rounded else EXACT
    if not typical <= most or (not rounded and not float(error.max()) <= most):
        raise UserError(
            f"{folder} computes other logits in plain transformers than the model that was trained: "
            f"off by {typical:.2g} of their size, at most {float(error.max()):.2g}"
        )
