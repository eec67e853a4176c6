"""Parts of a model that stay as they are: by kind, or by layer."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from luffy.errors import UserError

if TYPE_CHECKING:
    from luffy.hf.model import ParallelModel

# By the names that parallel models give their parameters (a tied head is the embedding).
FROZEN = {
    "router": r"\.router\.",
    "experts": r"\.(experts|shared_experts)\.",
    "attention": r"\.(self_attn|linear_attn)\.",
    "norms": r"norm[^.]*\.weight$",
    "embedding": r"\.embed_tokens\.",
    "head": r"lm_head\.",
}


def frozen_patterns(text: str) -> list[re.Pattern[str]]:
    """`router,layers 0-3` -> patterns of parameters' names; UserError for what is neither."""
    patterns = []
    for part in (p.strip() for p in text.split(",")):
        layers = re.fullmatch(r"layers[ =]?(\d+)(?:-(\d+))?", part)
        if layers is not None:
            first, last = int(layers[1]), int(layers[2] or layers[1])
            patterns.append(re.compile(rf"\.layers\.({'|'.join(map(str, range(first, last + 1)))})\."))
        elif part in FROZEN:
            patterns.append(re.compile(FROZEN[part]))
        else:
            raise UserError(f"--freeze {part!r}: name some of {', '.join(FROZEN)}, or layers A-B")
    return patterns


def freeze(parallel: ParallelModel, text: str) -> None:
    """Let the parameters that `text` names want no gradient. UserError where a part is in none, or all are."""
    for part, pattern in zip(text.split(","), frozen_patterns(text), strict=True):
        named = [p for name, p in parallel.named_parameters() if pattern.search(name)]
        if not named:
            raise UserError(f"--freeze {part.strip()}: the model has no such part")
        for p in named:
            p.requires_grad_(False)
    if not any(p.requires_grad for p in parallel.parameters()):
        raise UserError(f"--freeze {text}: nothing is left to train")
