"""Rebuild: a moved sequence is put together from answers at its new home b.

Its residual is not sent from the old home: dispatch already brought h_t, un-normed, to every rank with an expert of the
token, and one of those ranks, the *carrier*, adds it to its partial sum. The carrier is b itself where b holds a row of
the token (then the residual never travels again), else the rank of the token's first row.

Two kinds of row cannot carry. A row whose answer is shared (luffy.exchange.condense) goes back unsummed, for others
take it too; b can still take the residual from such a row of its own. A token that sent no row at all, condensed or
dropped by capacity, has none. Where neither b nor any other row can, the old home sends the
residual: a *token without carrier*.

What a receiver must be told is which token each row belongs to: one int32 a row. Where answers are shared it must also
learn who takes which, and with what weight: that table follows its sequence from the old home.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from luffy.comm import Comm, arrive, depart
from luffy.exchange.condense import Condensed
from luffy.exchange.copies import CopyKeys, ExpertMap
from luffy.exchange.dispatcher import Received
from luffy.exchange.migrate import Migration, transfer
from luffy.exchange.shared import take_shared
from luffy.exchange.stage import Stage
from luffy.kernels.order import stable_order


@dataclass(frozen=True)
class Carried:
    """For each received row, bool [R]: `added` to its partial sum here; `added_beside`: to the token, by itself."""

    added: Tensor
    added_beside: Tensor | None


def own_shared(received: Received, experts: ExpertMap, ep_rank: int) -> Tensor | None:
    """Whether the answer of each received row is shared: bool [R]; None where nothing is condensed."""
    if received.shared is None:
        return None
    return (received.shared & (experts.rank_of(received.expert_ids, received.source_for(experts)) == ep_rank)).any(1)


def carries_residual(
    received: Received, migration: Migration, experts: ExpertMap, ep_rank: int, own: Tensor | None
) -> Carried:
    """What this rank does about the residual of each received row. own: of `own_shared`."""
    assert received.global_token is not None
    sequence, new_home, _ = migration.place_of(received.global_token)
    moved = migration.on_device(migration.moved)[sequence].bool()
    ranks = experts.rank_of(received.expert_ids, received.source_for(experts))  # [R, K], -1 where no row was sent
    home_has_it = (ranks == new_home[:, None]).any(1)
    plain = ranks if received.shared is None else ranks.masked_fill(received.shared, -1)
    first = plain.gather(1, (plain >= 0).to(torch.int8).argmax(1, keepdim=True)).squeeze(1)
    carries = moved & (torch.where(home_has_it, new_home, first) == ep_rank)
    return Carried(carries, None) if own is None else Carried(carries & ~own, carries & own)


def tokens_without_carrier(keys: CopyKeys, shared: Tensor | None, migration: Migration) -> Tensor:
    """Rows of this rank's tokens whose residual no row carries to their new home, int64. `keys`: of the sent copies."""
    sequence, new_home, _ = migration.place_of(migration.old.global_token)
    moved = migration.on_device(migration.moved)[sequence].bool()
    plain = keys.rank >= 0 if shared is None else (keys.rank >= 0) & ~shared
    at_home = (keys.rank == new_home[:, None]).any(1)
    return (moved & ~plain.any(1) & ~at_home).nonzero().squeeze(1)


@dataclass(frozen=True)
class SharedAnswers:
    """Who takes which answer. condensed: of this rank's tokens, with their `weights` [T, K] and the `rank` that each
    copy goes to, int64 [T, K]. own: whether the answer of each received row is shared, bool [R].
    """

    condensed: Condensed
    weights: Tensor
    rank: Tensor
    own: Tensor

    def follow(self, migration: Migration, comm: Comm, source: Tensor, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The table at the new homes: (place among the answers there, whether there is one, weight), [T_new, K] each.

        source, row: int64 [n], the rank that each answer there came from, and the new row of the token that was sent
        for it; row -1 for answers that are not shared.
        """
        K, T_new = self.weights.shape[1], migration.new.num_tokens
        takes = self.condensed.takes_shared
        leader = migration.old.global_token[self.condensed.leader // K].to(torch.int32)
        columns = [leader, torch.where(takes, self.rank, -1).to(torch.int16), self.weights]
        leader, rank, weights = transfer(columns, migration.old, migration.new, comm, "control")  # [T_new, K]
        n, rank = len(source), rank.long()
        table = torch.full((comm.mesh.ep_size * T_new + 1,), n, dtype=torch.int64, device=source.device)
        table[torch.where(row < 0, comm.mesh.ep_size * T_new, source * T_new + row)] = torch.arange(
            n, device=source.device
        )
        at = rank * T_new + migration.place_of(leader.long().flatten())[2].unflatten(0, leader.shape)
        return table[torch.where(rank < 0, 0, at)], rank >= 0, weights


@dataclass(frozen=True)
class AtNewHome:
    """What arrives at this rank for a sequence plan, and where it goes.

    slot int64 [n]: the new row of the token that each answer is for, -1 - row where the answer is shared. num_own: of
    these, answers that were here already. source int64 [n]: the rank that each came from.
    """

    slot: Tensor
    num_own: int
    source: Tensor


def combine_at_new_home(
    hidden: Tensor,
    partial: Tensor,
    received: Received,
    migration: Migration,
    comm: Comm,
    base: Callable[[Tensor], Tensor],
    carried: Carried,
    without_carrier: Tensor | None,
    shared: SharedAnswers | None,
) -> Stage[Tensor]:
    """Partial sums (residuals already added by their carriers) to the new homes: the stream there, [T_new, D].

    hidden [T, D]: the stream at the old home. partial [R, D]. base(h): what a token has besides its routed experts,
    h itself plus shared experts; applied here to tokens that stay, to those without carrier (int64, rows of `hidden`)
    and to what is added beside. shared: who takes which answer; None where each is its token's own.
    """
    assert received.global_token is not None
    T_new = migration.new.num_tokens
    answers, at = yield from _send_home(hidden, partial, received, migration, comm, base, without_carrier, shared)
    before, after = migration.stayed_rows()
    wide = torch.promote_types(hidden.dtype, torch.float32)
    out = torch.zeros(T_new, hidden.shape[1], dtype=wide, device=hidden.device)
    out = out.index_add(0, after, base(hidden.index_select(0, before)).to(wide))
    if carried.added_beside is not None:
        index = carried.added_beside.nonzero().squeeze(1)
        taken = base(received.rows.index_select(0, index)).to(wide)
        out = out.index_add(0, migration.place_of(received.global_token[index])[2], taken)
    if shared is None:
        n = at.num_own
        out = out.index_add(0, at.slot[:n], answers[:n].to(wide))
        return out.index_add(0, at.slot[n:], answers[n:].to(wide)).to(hidden.dtype)
    mine = at.slot < 0
    out = out.index_add(0, torch.where(mine, 0, at.slot), answers.masked_fill(mine[:, None], 0).to(wide))
    place, takes, weights = shared.follow(migration, comm, at.source, torch.where(mine, -1 - at.slot, -1))
    return take_shared(out, answers, place, takes, weights).to(hidden.dtype)


def _send_home(
    hidden: Tensor,
    partial: Tensor,
    received: Received,
    migration: Migration,
    comm: Comm,
    base: Callable[[Tensor], Tensor],
    without_carrier: Tensor | None,
    shared: SharedAnswers | None,
) -> Stage[tuple[Tensor, AtNewHome]]:
    """Answers of this rank, and residuals without carrier, to their new homes: those that arrive here, [n, D]."""
    me, tokens, rows = comm.mesh.ep_rank, received.global_token, partial
    assert tokens is not None
    is_shared = None if shared is None else shared.own
    if without_carrier is not None:
        tokens = torch.cat([tokens, migration.old.global_token[without_carrier]])
        rows = torch.cat([rows, base(hidden.index_select(0, without_carrier))])
        if is_shared is not None:
            is_shared = torch.cat([is_shared, is_shared.new_zeros(len(without_carrier))])
    _, new_home, slot = migration.place_of(tokens)
    by_home = stable_order(torch.where(new_home == me, 0, new_home + 1), comm.mesh.ep_size + 1)
    exchange = migration.exchange(comm)
    n = rows.shape[0] - sum(exchange.input_splits)  # those that are at their new home already
    if is_shared is not None:
        slot = torch.where(is_shared, -1 - slot, slot)
    rows, slot = rows.index_select(0, by_home), slot[by_home].to(torch.int32)
    under_way = depart(
        [rows[n:], slot[n:]],
        exchange,
        directions=("combine", "control"),
        backward_directions=("combine_backward", "control"),
    )
    yield
    remote, remote_slot = arrive(under_way)
    slot = torch.cat([slot[:n], remote_slot]).long()
    splits = torch.tensor([n, *exchange.output_splits], device=slot.device)  # own rows stand first
    ranks = torch.tensor([me, *range(comm.mesh.ep_size)], device=slot.device)
    source = torch.repeat_interleave(ranks, splits, output_size=len(slot))
    return torch.cat([rows[:n], remote]), AtNewHome(slot, n, source)
