"""Which experts a rank holds while a layer runs, besides its own: decided, fetched, and held against a limit.

`fetch` (Janus) begins before attention, with what the ranks chose the last time: routers change slowly and most ranks
choose most experts, so that by the time the router has spoken there is little left to fetch. `shadow` (FasterMoE) can
only begin when the loads are known. Whatever is held is kept for the backward pass, as activations are.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.errors import UserError
from luffy.exchange.copies import ExpertMap, GuestMap
from luffy.exchange.guests import Departed, Guests, send_off, take_in
from luffy.plan.residency import Delivery, ExpertCosts, at_owners, deliver, expert_costs, fetched, shadowed
from luffy.plan.topology import Topology


class Experts(Protocol):
    """Experts that can visit other ranks: all weights of each end to end, [n, W]."""

    num_local: int

    @property
    def hidden_size(self) -> int: ...

    @property
    def device(self) -> torch.device: ...

    def flat(self) -> Tensor: ...

    def parameters(self) -> Iterator[torch.nn.Parameter]: ...


@dataclass
class ResidencyState:
    """What the layers of a model share.

    flops_per_second: of the experts, for the performance model of `shadow`; must be the same on all ranks.
    limit_num_bytes: of guests that a rank may hold at once; None for any. held: int64 [N], bytes that each rank of the
    EP group holds now. peak_num_bytes, num_guests: the most of any rank, and how many in all, since last taken.
    """

    topology: Topology
    flops_per_second: float = 1e13
    limit_num_bytes: int | None = None
    held: np.ndarray = field(init=False)
    peak_num_bytes: int = 0
    num_guests: int = 0

    def __post_init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        """Nothing is held any more: before a forward pass."""
        self.held = np.zeros(self.topology.world_size, dtype=np.int64)

    def hold(self, delivery: Delivery, expert_num_bytes: int) -> None:
        """Account for a delivery. UserError on every rank where one would hold more than the limit."""
        guests = delivery.num_guests()
        self.held = self.held + guests * expert_num_bytes
        self.num_guests += int(guests.sum())
        most = int(self.held.max())
        self.peak_num_bytes = max(self.peak_num_bytes, most)
        if self.limit_num_bytes is not None and most > self.limit_num_bytes:
            raise UserError(
                f"--fetch-limit {self.limit_num_bytes / 1e9:g}GB: rank {int(self.held.argmax())} would hold "
                f"{most / 1e9:.3g} GB of other ranks' experts; raise it, or use --residency static"
            )

    def take(self) -> dict[str, int]:
        """Counts since the last call."""
        out = {"peak_num_bytes": self.peak_num_bytes, "guests": self.num_guests}
        self.peak_num_bytes = self.num_guests = 0
        return out

    def costs(self, hidden_size: int, expert_size: int, itemsize: int) -> ExpertCosts:
        """What the performance model weighs, for experts of `expert_size` weights."""
        return expert_costs(self.topology, self.flops_per_second, hidden_size, expert_size, itemsize)


class LayerResidency:
    """One layer's guests. It remembers what was chosen last, the same on every rank. strategy: "fetch" or "shadow"."""

    def __init__(self, state: ResidencyState, comm: Comm, experts: Experts, strategy: str) -> None:
        self.state, self.comm, self.experts, self.strategy = state, comm, experts, strategy
        self.chosen: np.ndarray | None = None  # bool [E, N]
        self._slots: tuple[int, np.ndarray] | None = None
        self._map: tuple[bytes, bytes, GuestMap] | None = None

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None:
        """Begin to fetch what the ranks chose last; None where that is nothing. experts: where they live."""
        if not torch.is_grad_enabled():
            self.state.reset()
        if self.chosen is None or self.strategy != "fetch":
            return None
        slots = self._host(experts.slot_of_expert)
        return self._send(self.chosen | at_owners(self._owner(slots), self.comm.mesh.ep_size), slots, dtype)

    def settle(
        self, ids: Tensor, experts: ExpertMap, dtype: torch.dtype, departed: Departed | None
    ) -> tuple[ExpertMap, Tensor | None]:
        """Where the choices [T, K] of all ranks are served; the weights [F, W] of this rank's guests."""
        slots = self._host(experts.slot_of_expert)
        owner, N = self._owner(slots), self.comm.mesh.ep_size
        counts = torch.zeros(len(slots) + 1, dtype=torch.int32, device=ids.device)
        counts.index_add_(
            0, torch.where(ids < 0, len(slots), ids).flatten(), torch.ones_like(counts[:1]).expand(ids.numel())
        )
        chosen = self.comm.all_gather_ep(counts[:-1]).cpu().numpy().astype(np.int64)  # [N, E]
        if self.strategy == "fetch":
            wanted = fetched(chosen, owner)
            self.chosen = wanted
        else:
            size = sum(p[0].numel() for p in self.experts.parameters())
            costs = self.state.costs(self.experts.hidden_size, size, dtype.itemsize)
            wanted = shadowed(chosen, owner, costs)
        guests: Guests | None = None
        resident = at_owners(owner, N)
        if departed is not None:
            guests, resident = take_in(departed, self.comm), departed.delivery.resident
        missing = at_owners(owner, N) | (wanted & ~resident)
        if missing.sum() > len(owner):
            more = take_in(self._send(missing, slots, dtype), self.comm)
            guests, resident = more if guests is None else guests.joined(more), resident | missing
        if guests is None:
            return experts, None
        guest_map = self._guest_map(resident, guests.ids)
        return replace(experts, guests=guest_map, serves_all=self.strategy == "fetch"), guests.weights

    def _send(self, resident: np.ndarray, slots: np.ndarray, dtype: torch.dtype) -> Departed:
        state = self.state
        delivery = deliver(resident, self._owner(slots), state.topology, relay_at_home=self.strategy == "shadow")
        weights = self.experts.flat()
        state.hold(delivery, weights.shape[1] * dtype.itemsize)
        return send_off(weights, slots, delivery, self.comm, dtype)

    def _host(self, slot_of_expert: Tensor) -> np.ndarray:
        """The slots on the host, read back only after experts have moved."""
        version = slot_of_expert._version
        if self._slots is None or self._slots[0] != version:
            self._slots = version, slot_of_expert.cpu().numpy().copy()
        return self._slots[1]

    def _owner(self, slots: np.ndarray) -> np.ndarray:
        return slots // self.experts.num_local

    def _guest_map(self, resident: np.ndarray, ids: np.ndarray) -> GuestMap:
        key = resident.tobytes(), ids.tobytes()
        if self._map is None or self._map[:2] != key:
            place = np.full(len(resident), -1, dtype=np.int64)
            place[ids] = np.arange(len(ids))
            device = self.experts.device
            held = torch.from_numpy(resident.copy()).to(device)
            self._map = *key, GuestMap(held, torch.from_numpy(place).to(device), len(ids))
        return self._map[2]
