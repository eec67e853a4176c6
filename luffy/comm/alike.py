"""Ranks that differ at the start: found by one digest, then named by rank, by what differs, and by both values.

Collectives would not notice: ranks with other weights, options, data or code train on, each on something else.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.errors import RankMismatchError, UserError
from luffy.version import __version__

_WORDS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
_PIECE = 1 << 22


class RanksDifferError(UserError, RankMismatchError):
    """Ranks began with other weights, options, data or code; the line names rank, fact and both values."""


def check_alike(
    facts: Mapping[str, Any],
    device: torch.device,
    like: int = 0,
    mend: str = "",
    details: Mapping[str, str] | None = None,
) -> None:
    """RanksDifferError on every rank unless all ranks that give the same `like` give the same facts.

    facts: by a name that a person knows, such as `--lr`; values with a telling `str`. device: of the collective. mend:
    what to do, for the message. details: by fact, what is said of it but not compared. Every rank of the world calls
    it; without a world it does nothing.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return
    shown = {name: str(value) for name, value in facts.items()}
    digest = hashlib.blake2b(repr(sorted(shown.items())).encode(), digest_size=8).digest()
    mine = torch.tensor([like, int.from_bytes(digest, "little", signed=True)], device=device)
    gathered = [torch.empty_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, mine)
    pairs = {(int(a), int(b)) for a, b in torch.stack(gathered).tolist()}
    if len(pairs) == len({group for group, _ in pairs}):
        return
    everyone: list[Any] = [None] * len(gathered)
    details = details or {}
    dist.all_gather_object(everyone, (like, shown, {n: f"{details[n]} ({shown[n]})" for n in details}))
    for name in dict.fromkeys(name for _, facts_there, _ in everyone for name in facts_there):
        first: dict[int, tuple[int, str | None]] = {}
        for rank, (group, facts_there, _) in enumerate(everyone):
            value = facts_there.get(name)
            other, theirs = first.setdefault(group, (rank, value))
            if value != theirs:
                a, b = (everyone[r][2].get(name, v) for r, v in ((other, theirs), (rank, value)))
                raise RanksDifferError(
                    f"ranks differ at the start: {name} is {a} on rank {other} and {b} on rank {rank}"
                    + (f"; {mend}" if mend else "")
                )
    raise RanksDifferError("ranks differ at the start")


def check_weights(
    replicated: Iterable[tuple[str, Tensor]], own: Iterable[tuple[str, Tensor]], ep_rank: int, device: torch.device
) -> None:
    """RanksDifferError where ranks hold other replicated weights, or copies of experts that are not alike.

    own: a rank's experts, which all ranks of the same ep_rank have.
    """
    mend = "build the model from one seed or folder on all ranks"
    for kind, tensors, like in (("weights", replicated, 0), ("experts", own, ep_rank)):
        named = list(tensors)
        facts = {
            f"{kind} {name}": f"{value & (2**64 - 1):016x} {tuple(t.shape)}"
            for (name, t), value in zip(named, fingerprints([t for _, t in named]), strict=True)
        }
        try:
            check_alike(facts, device, like, mend)
        except RanksDifferError as error:
            raise RanksDifferError(f"ranks hold different {kind}: {error}") from None


@torch.no_grad()
def fingerprints(tensors: list[Tensor]) -> list[int]:
    """A number of 64 bits for the bits of each tensor, their order counting."""
    sums = []
    for tensor in tensors:
        flat = tensor.detach().contiguous().view(-1)
        total = torch.zeros((), dtype=torch.int64, device=tensor.device)
        for piece in (flat.view(_WORDS[flat.element_size()]) if flat.numel() else flat).split(_PIECE):
            odd = torch.arange(len(piece), device=tensor.device) * 2 + 1
            total = total * 1_000_003 + (piece.to(torch.int64) * odd).sum()
        sums.append(total)
    return torch.stack(sums).tolist() if sums else []


@functools.cache
def code_facts() -> dict[str, str]:
    """What runs here: versions, and a digest of Luffy's own source."""
    source, root = hashlib.blake2b(digest_size=6), Path(__file__).parents[1]
    for path in sorted(root.rglob("*.py")):
        source.update(str(path.relative_to(root)).encode() + path.read_bytes())
    return {"luffy": f"{__version__} ({source.hexdigest()})", "torch": torch.__version__}
