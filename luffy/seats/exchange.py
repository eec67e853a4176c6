"""Sequences to their seats where every rank reads its own: one call before the model, another for what comes out.

    seated = exchange(comm, seats, input_ids, labels=labels, attention_mask=attention_mask)
    losses = model(**seated.inputs)                    # of the sequences that sit here
    mine = seated.sequences_home(losses)               # of those that this rank has read, in their order

What moves are token ids, labels and positions, four bytes each a token. Seats are of the whole world: a sequence may
also go to another data-parallel group. A row of a batch sits as a whole, so packed rows stay together.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.comm.world_rows import all_to_all_world
from luffy.data.loader import IGNORE_INDEX
from luffy.errors import RankMismatchError, UserError
from luffy.seats.layout import Seating, SeatLayout
from luffy.seats.seater import Seats


@dataclass(frozen=True, eq=False)
class Seated:
    """The sequences that sit on this rank, in reading order (rank after rank, row after row), and the way back.

    input_ids, attention_mask, labels, position_ids: int64 [S, L], tokens from the left, padded to the longest; None
    what was not given. topic: int64 [S] or None. num_labels: of the whole world, for the mean of a loss.
    num_topics: see Seating. moved_share: of the world's sequences, that sit elsewhere than where they were read.
    """

    comm: Comm
    input_ids: Tensor
    attention_mask: Tensor
    labels: Tensor | None
    position_ids: Tensor | None
    topic: Tensor | None
    num_topics: int
    num_labels: int
    moved_share: float
    own_mask: Tensor  # bool [B, L]: the tokens of this rank's own batch
    seat_of_own: np.ndarray  # [B] world ranks
    reader_of_seated: np.ndarray  # [S] world ranks, ascending

    @property
    def inputs(self) -> dict[str, Tensor]:
        """What a model of the library is called with."""
        named = {
            "input_ids": self.input_ids,
            "attention_mask": self.attention_mask,
            "labels": self.labels,
            "position_ids": self.position_ids,
        }
        return {name: value for name, value in named.items() if value is not None}

    @torch.no_grad()
    def sequences_home(self, values: Tensor) -> Tensor:
        """[S, ...] of the sequences that sit here -> [B, ...] of those that this rank has read, in their order.

        Every rank calls it; no gradient flows back. Raises UserError where values are not one a sequence.
        """
        _require_rows("sequences_home", values, len(self.reader_of_seated))
        world = self.comm.mesh.world_size
        back = all_to_all_world(
            values, _splits(self.reader_of_seated, world), _splits(self.seat_of_own, world), self.comm
        )
        out = torch.empty_like(back)
        out[_index(np.argsort(self.seat_of_own, kind="stable"), back)] = back
        return out

    @torch.no_grad()
    def tokens_home(self, values: Tensor, fill: float = 0.0) -> Tensor:
        """[S, L, ...] of tokens of the sequences that sit here -> [B, L, ...] as this rank read them; padding: `fill`.

        Every rank calls it; no gradient flows back. Raises UserError where values are not one a token.
        """
        _require_rows("tokens_home", values, len(self.reader_of_seated))
        mask = self.attention_mask.bool()
        if values.shape[:2] != mask.shape:
            raise UserError(f"tokens_home: values are {list(values.shape)}, the tokens {list(mask.shape)}")
        world, lengths = self.comm.mesh.world_size, mask.sum(1).cpu().numpy()
        own_lengths = self.own_mask.sum(1).cpu().numpy()
        back = all_to_all_world(
            values[mask],
            _splits(self.reader_of_seated, world, lengths),
            _splits(self.seat_of_own, world, own_lengths),
            self.comm,
        )
        out = values.new_full((*self.own_mask.shape, *values.shape[2:]), fill)
        order = np.argsort(self.seat_of_own, kind="stable")
        begins = np.cumsum(own_lengths) - own_lengths
        place = np.concatenate([np.zeros(0, np.int64), *(begins[i] + np.arange(own_lengths[i]) for i in order)])
        in_order = torch.empty_like(back)
        in_order[_index(place, back)] = back
        out[self.own_mask.to(out.device)] = in_order
        return out


def exchange(
    comm: Comm,
    seats: Seats,
    input_ids: Tensor,
    labels: Tensor | None = None,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    layout: SeatLayout | None = None,
) -> Seated:
    """Bring the sequences of all ranks to their seats. Every rank calls it, with a batch [B, L] of its own, B >= 1.

    seats: alike on all ranks, with the same state. attention_mask: 1 for tokens, None: all are. layout: of one
    micro-batch; None: that of the mesh. A seating that left a rank without a sequence is not followed.

    Raises UserError for tensors that do not fit each other, RankMismatchError where ranks gave different ones or
    decided differently.
    """
    mask = _checked(input_ids, labels, attention_mask, position_ids)
    mesh, device = comm.mesh, input_ids.device
    layout = SeatLayout(mesh.ep_size, mesh.dp_size) if layout is None else layout
    columns = {"input_ids": input_ids, "labels": labels, "position_ids": position_ids}
    given = [name for name, value in columns.items() if value is not None]

    lengths = mask.sum(1).cpu().numpy().astype(np.int64)
    tokens = torch.stack([columns[name][mask] for name in given], dim=1).to(torch.int32)  # type: ignore[index]
    ids = tokens[:, 0].cpu().numpy().astype(np.int64)
    described = seats.describe(np.split(ids, np.cumsum(lengths)[:-1]))
    num_labels = 0 if labels is None else int((labels[mask] != IGNORE_INDEX).sum())
    kind = sum(1 << i for i, name in enumerate(columns) if name in given)
    counts = _gather(np.array([len(lengths), described.shape[1], kind, num_labels]), comm)
    if (counts[:, 1:3] != counts[0, 1:3]).any():
        raise RankMismatchError("exchange: ranks gave other tensors (labels, position_ids) or other seats than rank 0")
    padded = np.zeros((counts[:, 0].max(), 1 + described.shape[1]), dtype=np.int64)
    padded[: len(lengths)] = np.concatenate([lengths[:, None], described], axis=1)
    of_all = np.concatenate([rows[:n] for rows, n in zip(_gather(padded, comm), counts[:, 0], strict=True)])

    reader = np.repeat(np.arange(mesh.world_size), counts[:, 0])
    seating = _decide(seats, of_all, reader, layout, comm)
    own, here = seating.rank[reader == mesh.rank], seating.rank == mesh.rank
    seated_lengths, readers = of_all[here, 0], reader[here]
    order = np.argsort(own, kind="stable")
    begins = np.cumsum(lengths) - lengths
    leaving = np.concatenate([np.zeros(0, np.int64), *(begins[i] + np.arange(lengths[i]) for i in order)])
    arrived = all_to_all_world(
        tokens[_index(leaving, tokens)],
        _splits(own, mesh.world_size, lengths),
        _splits(readers, mesh.world_size, seated_lengths),
        comm,
    ).to(device, torch.int64)

    seated_mask = torch.arange(int(seated_lengths.max(initial=0))) < torch.from_numpy(seated_lengths)[:, None]
    seated_mask = seated_mask.to(device)
    fills = {"input_ids": 0, "labels": IGNORE_INDEX, "position_ids": 0}
    out = {name: torch.full(seated_mask.shape, fills[name], dtype=torch.int64, device=device) for name in given}
    for i, name in enumerate(given):
        out[name][seated_mask] = arrived[:, i]
    topic = None if seating.topic is None else torch.from_numpy(seating.topic[here]).to(device)
    return Seated(
        comm, out["input_ids"], seated_mask.to(torch.int64), out.get("labels"), out.get("position_ids"), topic,
        seating.num_topics, int(counts[:, 3].sum()), float((seating.rank != reader).mean()), mask, own, readers,
    )  # fmt: skip


def _decide(seats: Seats, of_all: np.ndarray, reader: np.ndarray, layout: SeatLayout, comm: Comm) -> Seating:
    """The seating, the same on every rank or an error."""
    read = Seating(reader.astype(np.int64), np.zeros(len(reader), dtype=np.int64))
    seating = seats.place(of_all[:, 1:], of_all[:, 0], layout, read)
    held = np.bincount(seating.rank, minlength=comm.mesh.world_size)
    if (held == 0).any():
        seating = Seating(read.rank, read.micro_batch, seating.topic, seating.num_topics)
    digest = hashlib.blake2b(seating.rank.astype("<i8").tobytes(), digest_size=8).digest()
    digests = _gather(np.array([int.from_bytes(digest, "little", signed=True)]), comm)[:, 0]
    if odd := np.flatnonzero(digests != digests[0]).tolist():
        raise RankMismatchError(f"exchange: ranks {odd} decided other seats than rank 0; give all the same seats")
    return seating


def _checked(ids: Tensor, labels: Tensor | None, mask: Tensor | None, positions: Tensor | None) -> Tensor:
    """Where tokens are, bool [B, L]."""
    if ids.dim() != 2 or not len(ids):
        raise UserError(f"input_ids must be [batch, length] with a row at least, not {list(ids.shape)}")
    for name, value in (("labels", labels), ("attention_mask", mask), ("position_ids", positions)):
        if value is not None and value.shape != ids.shape:
            raise UserError(f"{name} {list(value.shape)} must be of the shape of input_ids, {list(ids.shape)}")
    return torch.ones_like(ids, dtype=torch.bool) if mask is None else mask.bool()


def _require_rows(name: str, values: Tensor, num: int) -> None:
    if values.dim() == 0 or len(values) != num:
        raise UserError(f"{name}: {list(values.shape)} is not one row for each of the {num} sequences that sit here")


def _gather(mine: np.ndarray, comm: Comm) -> np.ndarray:
    """int64 [n...] of every rank -> [world, n...]."""
    return comm.all_gather_world(torch.from_numpy(mine).to(comm.mesh.device)).cpu().numpy()


def _splits(ranks: np.ndarray, world: int, weights: np.ndarray | None = None) -> list[int]:
    """How many of each rank: sequences, or what they weigh."""
    return np.bincount(ranks, weights, minlength=world).astype(np.int64).tolist()


def _index(array: np.ndarray, like: Tensor) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(like.device)
