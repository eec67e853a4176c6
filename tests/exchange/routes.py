"""Random routings, and one pass of rows through a dispatcher and experts that do next to nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.comm.clock import PhaseClock
from luffy.data.batch import Layout, SequenceTable, TokenBatch
from luffy.exchange.copies import Copies, ExpertMap
from luffy.exchange.direct import Direct
from luffy.exchange.dispatcher import Dispatcher, Tokens
from luffy.exchange.permute import pairs_by_expert
from luffy.exchange.stage import Stage, finish
from luffy.exchange.tally import RowTally
from luffy.exchange.wire import Draws, Transport
from luffy.kernels.rows import sum_rows
from luffy.wire_format import parse_wire

PER = ("pairs", "ranks")


def random_routing(
    rank: int, num_tokens: int, num_experts: int, top_k: int, seed: int, drop: float = 0.0
) -> np.ndarray:
    """Expert ids int64 [T, K] of `rank`: distinct for a token, -1 for a share `drop` of the choices.

    Seeded by rank, so that any rank can work out what any other rank's routing is.
    """
    generator = np.random.default_rng([seed, rank])
    ids = np.argsort(generator.random((num_tokens, num_experts)), axis=1)[:, :top_k]
    return np.where(generator.random(ids.shape) < drop, -1, ids)


class Scales(torch.nn.Module):
    """Experts that multiply rows by one weight each, those of this rank; all ones at first."""

    hidden_size = 4

    def __init__(self, num_local: int) -> None:
        super().__init__()
        self.num_local = num_local
        self.weight = torch.nn.Parameter(torch.ones(num_local, 1, dtype=torch.float64))

    @property
    def device(self) -> torch.device:
        return self.weight.device

    def flat(self) -> Tensor:
        return self.weight

    def parameters(self, recurse: bool = True) -> Iterator[torch.nn.Parameter]:
        yield self.weight


def direct(comm: Comm, per: str = "ranks", wire: str = "model") -> Direct:
    mesh = comm.mesh
    return Direct(comm, PhaseClock(mesh.device), per, Transport(parse_wire(wire), Draws(mesh.rank), 0), RowTally())


def batch_of(hidden: Tensor, lengths: list[list[int]], rank: int) -> TokenBatch:
    """The stream [T, D] of this rank; lengths: of the sequences of each rank."""
    home = [r for r, of in enumerate(lengths) for _ in of]
    table = SequenceTable(np.array([n for of in lengths for n in of], dtype=np.int64), np.array(home, dtype=np.int64))
    return TokenBatch(hidden, Layout(table, rank, hidden.device))


def pass_through(
    dispatcher: Dispatcher,
    batch: TokenBatch,
    ids: Tensor,
    weights: Tensor,
    comm: Comm,
    experts: ExpertMap,
    work: Callable[[Tensor, Tensor], Tensor] | None = None,
    scales: Scales | None = None,
) -> tuple[TokenBatch, Copies]:
    """hidden + sum_k weights_k work(hidden, expert_k), by way of the ranks that own the experts.

    work: [P, D] rows and int64 [P] ids of their experts -> [P, D]. scales: multiply rows, guests' among them.
    """
    mesh = comm.mesh
    seen: list[Copies] = []

    def stages() -> Stage[TokenBatch]:
        tokens = Tokens(
            batch, batch.hidden, ids, weights, experts, norm=lambda rows: rows, base=lambda rows, normed=None: rows,
            condenses=True, departed=dispatcher.prefetch(experts, batch.hidden.dtype),
        )  # fmt: skip
        received = yield from dispatcher.dispatch(tokens)
        seen.append(received.copies)
        source = received.source_for(received.experts)
        pairs = pairs_by_expert(received.expert_ids, received.experts, mesh.ep_rank, received.copies.num_pairs, source)
        answers = received.norm(received.rows)[pairs.row]
        if work is not None:
            answers = work(answers, received.expert_ids.flatten()[pairs.flat])
        if scales is not None:
            held = scales.weight if received.guests is None else torch.cat([scales.weight, received.guests])
            answers = answers * held.index_select(0, pairs.group)
        answers = (answers * received.weights.flatten()[pairs.flat][:, None]).to(answers.dtype)
        partial = sum_rows(answers, pairs.row, pairs.place)
        return (yield from dispatcher.combine(tokens, received, partial))

    return finish(stages()), seen[0]


def expert_map(num_experts: int, ep_size: int, seed: int | None = None) -> ExpertMap:
    """Experts in order, or with a seed shuffled over the slots."""
    slots = np.arange(num_experts) if seed is None else np.random.default_rng(seed).permutation(num_experts)
    return ExpertMap(torch.from_numpy(slots), num_experts // ep_size)
