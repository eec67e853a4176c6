"""A process of plain transformers that opens a folder and computes logits. It imports nothing of Luffy.

    python -P luffy/hf/opened.py FOLDER QUESTION ANSWER

QUESTION is a safetensors file with `tokens` [B, L]. ANSWER gets `logits` [B, L, V] in float32, and in its metadata
which weights transformers did not find, did not want, or found in another shape: there it goes on with random ones.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import torch
import transformers
from safetensors.torch import load_file, save_file


def main(folder: str, question: str, answer: str) -> None:
    transformers.utils.logging.set_verbosity_error()
    tokens = load_file(question)["tokens"]
    auto: Any = transformers.AutoModelForCausalLM
    model, info = auto.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, output_loading_info=True, attn_implementation="eager"
    )
    with torch.no_grad():
        logits = model.eval()(tokens, use_cache=False).logits.float()
    found = {
        what: sorted(str(k) for k in info.get(f"{what}_keys", ())) for what in ("missing", "unexpected", "mismatched")
    }
    save_file({"logits": logits.contiguous()}, answer, metadata={"found": json.dumps(found)})


if __name__ == "__main__":
    main(*sys.argv[1:])
