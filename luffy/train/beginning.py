"""What a run begins from: the same on all ranks, and what a resumed one has in common with the run that it continues.

An option that is new here is compared between ranks, and said when a resumed run changes it, unless it is named below.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np

from luffy.comm import Mesh
from luffy.comm.alike import check_alike, code_facts
from luffy.config import ModelConfig
from luffy.errors import UserError

# May differ between nodes: where things are. What is there is compared by what it holds.
OF_A_NODE = ("ranks", "out", "cache_dir", "data", "validation", "tokenizer", "start_weights", "interface")
# A run that continues with another of these would be neither the old run nor a new one.
CONTRADICTIONS = (
    "seed", "batch_size", "accumulate", "overlap", "sequence_length", "sequence_mode", "text_field", "loss_on",
    "lora", "lora_alpha", "lora_on", "dora", "freeze",
)  # fmt: skip
# Change neither what is trained nor how it is measured, or are compared by what they name.
WITHOUT_EFFECT = (
    *OF_A_NODE, "device", "backend", "resume", "overwrite", "ep_size", "ranks_per_node", "topology", "timeout_seconds",
    "eval_every", "checkpoint_every", "keep_checkpoints", "async_checkpoints", "export", "verify_export", "tensorboard",
    "log", "trace_every", "recompute", "profile_attention", "fetch_limit", "layout", "dense", "max_restarts",
    "min_ranks", "vocab_size",
)  # fmt: skip


def option_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def shown(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def check_options(options: Mapping[str, Any], mesh: Mesh) -> None:
    """RanksDifferError where ranks run other code or other options; options: by name, as `to_dict` gives them."""
    facts = {option_of(n): shown(v) for n, v in options.items() if n not in OF_A_NODE}
    check_alike(code_facts() | facts, mesh.device, mend="start all ranks with the same")


def data_facts(loader: Any, valid_loader: Any, vocabulary: str) -> dict[str, str]:
    """Digests of what is read: `data`, all sequences of training and held-out part, and `tokenizer`.

    vocabulary: what stands for the tokenizer, the same wherever its tokens mean the same.
    """
    parts = [None if x is None else _contents(x) for x in (loader, valid_loader)]
    return {"data": _digest(repr(parts).encode()), "tokenizer": _digest(vocabulary.encode())}


def _contents(loader: Any) -> Any:
    examples = getattr(loader, "examples", None)
    if examples is None:
        return loader.fingerprint
    arrays = (examples.tokens, examples.trained, examples.starts, loader.indices)
    return [_digest(np.ascontiguousarray(a).data) for a in arrays]


def _digest(content: Any) -> str:
    return hashlib.blake2b(content, digest_size=8).hexdigest()


def check_data(facts: Mapping[str, str], where: str, mesh: Mesh) -> None:
    """RanksDifferError where ranks read other tokens. where: what --data names on this rank, for the message."""
    check_alike(
        {"--data": facts["data"], "--tokenizer": facts["tokenizer"]}, mesh.device,
        mend="give all ranks the same files", details={"--data": where},
    )  # fmt: skip


def changes_on_resume(
    path: Any, meta: Mapping[str, Any], options: Mapping[str, Any], facts: Mapping[str, str]
) -> list[str]:
    """What the resumed run does otherwise than the one that wrote checkpoint `path`: a line each, for a person to read.

    meta: of the checkpoint. options, facts: of this run. UserError for what cannot be part of one run.
    """
    before, lines = meta["options"], []
    if options["steps"] < meta["step"]:
        raise UserError(
            f"--resume: --steps {options['steps']} is less than the {meta['step']} steps that {path} has; give more, "
            "or choose another --out"
        )
    for name, now in options.items():
        then = before.get(name, now)
        if then == now or name in WITHOUT_EFFECT:
            continue
        if name in CONTRADICTIONS:
            raise UserError(
                f"--resume: the run began with {option_of(name)} {shown(then)}, not {shown(now)}; give it again as "
                "it was"
            )
        lines.append(f"{option_of(name)} was {shown(then)}, is {shown(now)}")
    known = meta.get("data", facts)
    if known["tokenizer"] != facts["tokenizer"]:
        raise UserError(
            "--resume: the run began with another tokenizer, so its tokens mean something else; give --tokenizer, "
            "or --data, as it was"
        )
    if known["data"] != facts["data"]:
        lines.append(f"--data was {before.get('data')}, is {options['data']}, with other text: it is read from here on")
    return lines


def check_model(path: Any, before: Mapping[str, Any], config: ModelConfig) -> None:
    """UserError naming what differs between the model of checkpoint `path` and this one."""
    old, new = _flat(before), _flat(config.to_dict())
    differing = [f"{n} was {old.get(n)}, is {new[n]}" for n in new if new[n] != old.get(n)]
    if differing:
        raise UserError(f"--resume: {path} holds a model with other settings ({', '.join(differing)})")


def _flat(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Without the preset's name, and router settings among the others."""
    rest = {n: v for n, v in settings.items() if n not in ("router", "name")}
    return rest | dict(settings["router"])
