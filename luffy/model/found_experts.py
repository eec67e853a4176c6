"""Experts in a module that somebody else wrote: a list of small networks, or tensors stacked over experts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

# Gate, value, out; and what is one matrix before the activation, out.
_GATED = (("w1", "w3", "w2"), ("gate_proj", "up_proj", "down_proj"), ("w_gate", "w_up", "w_down"))
_JOINED = (
    ("gate_up_proj", "down_proj"), ("w_in", "w_out"), ("w13", "w2"), ("w1", "w2"), ("up_proj", "down_proj"),
    ("fc1", "fc2"), ("0", "2"),
)  # fmt: skip


@dataclass(frozen=True)
class FoundExperts:
    """holder: a ModuleList of experts, or what holds stacked parameters. names: of its matrices, the last one leads
    out. hidden_size: D. lies: whether stacked matrices are [.., in, out]; those of nn.Linear are [out, in].
    """

    holder: Any
    names: tuple[str, ...]
    num_experts: int
    hidden_size: int
    lies: bool = False

    @property
    def listed(self) -> bool:
        return isinstance(self.holder, nn.ModuleList)

    @property
    def one(self) -> Any:
        return self.holder[0] if self.listed else self.holder

    @property
    def example(self) -> Tensor:
        return next(self.parameters())

    @property
    def gated(self) -> bool:
        first, last = (self._matrix(0, n).numel() for n in (self.names[0], self.names[-1]))
        return len(self.names) == 3 or first == 2 * last

    def parameters(self) -> Iterator[nn.Parameter]:
        """Those that `weights` reads."""
        owners = list(self.holder) if self.listed else [self.holder]
        for owner in owners:
            for name in self.names:
                part = _named(owner, name)
                yield from part.parameters() if isinstance(part, nn.Module) else (part,)
                if not isinstance(part, nn.Module) and (bias := _stacked_bias(owner, name)) is not None:
                    yield bias

    def _matrix(self, expert: int, name: str) -> Tensor:
        if self.listed:
            part = _named(self.holder[expert], name)
            return getattr(part, "weight", part)  # a module's, or the tensor itself
        return _named(self.holder, name)[expert]

    def _bias(self, expert: int, name: str) -> Tensor | None:
        if self.listed:
            return getattr(_named(self.holder[expert], name), "bias", None)
        stacked = _stacked_bias(self.holder, name)
        return None if stacked is None else stacked[expert]

    def sizes(self) -> list[int]:
        """What the width of a row may be: sizes that the first matrix and the last have in common."""
        first, last = (self._matrix(0, n).shape for n in (self.names[0], self.names[-1]))
        return sorted(set(first) & set(last))

    def ways(self) -> list[bool]:
        """How matrices may lie, as far as their shapes tell."""
        D = self.hidden_size
        ways = []
        for lies in (False, True):
            *ins, last = (self._matrix(0, n).shape if lies else self._matrix(0, n).t().shape for n in self.names)
            width = sum(s[1] for s in ins)
            if all(s[0] == D for s in ins) and last[1] == D and width in (last[0], 2 * last[0]):
                ways.append(lies)
        return ways

    def weights(self, expert: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """w_in [D, width], w_out [F, D], b_in [width], b_out [D] of one expert; gate before value."""
        *ins, out = ((m if self.lies else m.t()) for m in (self._matrix(expert, n).detach() for n in self.names))
        *b_ins, b_out = (self._bias(expert, n) for n in self.names)
        b_in = None
        if any(b is not None for b in b_ins):
            b_in = torch.cat(
                [w.new_zeros(w.shape[1]) if b is None else b.detach() for w, b in zip(ins, b_ins, strict=True)]
            )
        return torch.cat(ins, dim=1), out, b_in, None if b_out is None else b_out.detach()

    def put(self, expert: int, w_in: Tensor, w_out: Tensor, b_in: Tensor | None, b_out: Tensor | None) -> None:
        """Write one expert: what `weights` reads."""
        *ins, out = ((m if self.lies else m.t()) for m in (self._matrix(expert, n).detach() for n in self.names))
        widths = [m.shape[1] for m in ins]
        out.copy_(w_out)
        for m, part in zip(ins, w_in.split(widths, dim=1), strict=True):
            m.copy_(part)
        *b_ins, b = (self._bias(expert, n) for n in self.names)
        for bias, part in zip(b_ins, () if b_in is None else b_in.split(widths), strict=b_in is not None):
            if bias is not None:
                bias.detach().copy_(part)
        if b is not None and b_out is not None:
            b.detach().copy_(b_out)

    def share(self, first: int, num: int) -> list[Tensor | None]:
        """`weights` of experts first .. first + num, stacked, as new tensors."""
        own = [self.weights(e) for e in range(first, first + num)]
        return [None if part[0] is None else torch.stack(part) for part in zip(*own, strict=True)]


def _named(owner: Any, name: str) -> Any:
    return owner[int(name)] if name.isdigit() else getattr(owner, name)


def _stacked_bias(owner: Any, name: str) -> nn.Parameter | None:
    for bias in (f"{name}_bias", f"b{name[1:]}" if name.startswith("w") else ""):
        if isinstance(found := getattr(owner, bias, None), nn.Parameter):
            return found
    return None


def find_experts(module: nn.Module) -> FoundExperts | str:
    """The experts of a module, or why there are none."""
    holder: Any = getattr(module, "experts", module)
    listed = isinstance(holder, nn.ModuleList)
    if listed and not len(holder):
        return "its list of experts is empty"
    names = _names_of(holder[0] if listed else holder)
    if names is None:
        return f"its experts are neither a list nor stacked, with matrices of known names ({_known()})"
    if listed and any(_names_of(e) != names for e in holder):
        return "its experts are not alike"
    stacks = [] if listed else [_named(holder, n) for n in names]
    if any(not isinstance(s, nn.Parameter) or s.dim() != 3 or s.shape[0] != stacks[0].shape[0] for s in stacks):
        return f"{', '.join(names)} are not matrices stacked over experts"
    E = len(holder) if listed else len(stacks[0])
    # The gate tells what is the width of a row, where that and an expert's own could be either.
    gates = {d for p in module.parameters() if p.dim() == 2 and E in p.shape for d in p.shape}
    found = FoundExperts(holder, names, E, 0)
    fitting = [
        f for d in sorted(found.sizes(), key=lambda d: d not in gates) if (f := replace(found, hidden_size=d)).ways()
    ]
    return fitting[0] if fitting else f"{', '.join(names)} do not fit each other"


def _names_of(owner: Any) -> tuple[str, ...] | None:
    """Names of the matrices of an expert, or of stacked ones."""
    has = {n for n, _ in owner.named_children()} | {n for n, _ in owner.named_parameters(recurse=False)}
    found = next((names for names in (*_GATED, *_JOINED) if set(names) <= has), None)
    if found is None or all(isinstance(_named(owner, n), nn.Linear | nn.Parameter) for n in found):
        return found
    return None


def _known() -> str:
    return ", ".join("/".join(names) for names in (*_GATED, *_JOINED[:-1]))
