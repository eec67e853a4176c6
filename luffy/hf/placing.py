"""Which tensors of a checkpoint make up which parameter, for reading and for writing."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass

from luffy.hf.families import Family


@dataclass(frozen=True)
class Source:
    """Where a parameter's values stand.

    keys: a tensor; or with `per_expert`, for each expert e its parts `key.format(e=e)`, end to end along their first
    axis. Without `per_expert` an expert's parameter is one stacked tensor.
    """

    keys: tuple[str, ...]
    per_expert: bool = False

    def of(self, expert: int) -> list[str]:
        return [key.format(e=expert) for key in self.keys]


def source_of(name: str, family: Family, sparse_blocks: Container[str], present: Container[str] | None) -> Source:
    """Of a parameter by its library name.

    sparse_blocks: names of the blocks with experts (`model.layers.0.mlp`). present: tensors of the folder that is
    read; None: the names to write. Both of the library's namings are read: that of checkpoints, and its modules' own.
    """
    block = ".".join(name.split(".")[:4])
    if block not in sparse_blocks:
        return Source((name,))
    rest, disk = name[len(block) + 1 :], family.on_disk
    on_disk = block if disk.block is None else f"{block.rsplit('.', 1)[0]}.{disk.block}"
    if not rest.startswith("experts."):
        written = f"{on_disk}.{disk.renamed.get(rest, rest)}"
        return Source((name,) if present is not None and written not in present and name in present else (written,))
    if present is not None and name in present:
        return Source((name,))
    parts = tuple(f"{on_disk}.{part}" for part in disk.parts[rest.removeprefix("experts.")])
    return Source(parts, per_expert="{e}" in parts[0])
