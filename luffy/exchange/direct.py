"""Direct dispatch: a row to each rank (or each expert) that a token chose, one partial sum back.

The row sent is h_t, the stream *before* the layer's norm. The receiver applies the norm, whose weights every rank has;
so a sequence that moves finds its residual already there. Along with each row travel the ids and the weights of the
token's experts, in the same message. Rows return in the order in which they were sent, so that their tokens are known
without being told.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import torch
from torch import Tensor

from luffy.comm import Codec, Comm, RowsUnderWay, arrive, depart
from luffy.comm.clock import PhaseClock, boundary
from luffy.data.batch import TokenBatch
from luffy.exchange.copies import Copies, ExpertMap, all_local, copy_keys, exchange_counts
from luffy.exchange.dispatcher import Received, Tokens
from luffy.exchange.guests import Departed
from luffy.exchange.stage import Stage
from luffy.exchange.tally import RowTally
from luffy.exchange.wire import Transport
from luffy.kernels.rows import gather_rows, sum_rows

# Marks a shared choice beside its expert id: ids fit in 14 bits, and 16,383 experts are more than anyone trains.
_SHARED = 1 << 14


class Direct:
    """per: "ranks", a token's row goes once to each rank with any of its experts; "pairs", once to each of its experts,
    as in the classic systems. transport: in which formats rows cross links."""

    def __init__(self, comm: Comm, clock: PhaseClock, per: str, transport: Transport, tally: RowTally) -> None:
        self.comm, self.clock, self.per, self.transport, self.tally = comm, clock, per, transport, tally

    def prefetch(self, experts: ExpertMap, dtype: torch.dtype) -> Departed | None:
        return None

    def dispatch(self, tokens: Tokens) -> Stage[Received]:
        mesh, ids = self.comm.mesh, tokens.topk_expert_ids
        keys = tokens.keys or copy_keys(ids, tokens.experts, mesh.ep_rank, self.per)
        hidden = boundary(tokens.hidden, self.clock, "other", "exchange")
        asked = None if tokens.ask is None else tokens.ask(keys, tokens.shared)
        if tokens.experts.serves_all and asked is None:
            copies, told = all_local(keys, ids, self.comm), None
        else:
            copies, counts, told = exchange_counts(keys, ids, self.comm, asked)
            self.tally.note(self.transport.layer, counts)
        wire, n = self.transport.codecs("dispatch"), copies.num_local
        num_away = len(copies.flat) - n

        choices, weights = ids, tokens.topk_weights if tokens.weights is None else tokens.weights
        if tokens.shared is not None:
            choices = torch.where(keys.rank < 0, -1, choices) + tokens.shared * _SHARED
        if self.per == "pairs":  # such a copy serves one choice, and need not tell of the others: K becomes 1
            ids, weights = (t.reshape(-1, 1).index_select(0, copies.flat) for t in (choices, weights))
        else:
            ids, weights = (t.index_select(0, copies.token) for t in (choices, weights))  # [C, K]
        sent = None if tokens.rows is None else tokens.rows(copies)
        codecs: tuple[Codec | None, Codec | None]
        if sent is None and wire.coded:  # gathered by what encodes them
            own, away = hidden.index_select(0, copies.token[:n]), hidden
            codecs = wire.gathering(copies.token[n:], hidden.shape[0])
        else:
            rows = gather_rows(hidden, copies.token, copies.place) if sent is None else sent
            own, away = rows.split([n, num_away])
            codecs = wire.plain
        columns = [ids.to(torch.int16), weights]
        if tokens.names_tokens:
            columns.append(tokens.batch.layout.global_token[copies.token].to(torch.int32))
        columns_here, columns_away = zip(*(c.split([n, num_away]) for c in columns), strict=True)
        under_way = depart(
            [away, *columns_away],
            copies.exchange,
            directions=("dispatch", *("control",) * len(columns)),
            backward_directions=("dispatch_backward", *("control",) * len(columns)),
            codecs=(codecs, *((None, None),) * len(columns)),
        )
        if tokens.told is not None:
            assert told is not None
            self._meanwhile(lambda: tokens.told(told), under_way.is_over)  # type: ignore[misc]
        yield
        here, remote = [wire.staying(own), *columns_here], arrive(under_way)
        rows, ids, weights, *rest = (torch.cat([c, r]) for c, r in zip(here, remote, strict=True))
        rows = boundary(rows, self.clock, "exchange", "experts")
        ids, shared = ids.long(), None
        if tokens.shared is not None:
            shared = ids >= _SHARED
            ids = ids - shared * _SHARED
        return Received(
            rows, ids, weights, copies, keys, tokens.norm_there or tokens.norm, tokens.experts,
            global_token=rest[0].long() if tokens.names_tokens else None, shared=shared, sent=sent,
        )  # fmt: skip

    def _meanwhile(self, work: Callable[[], None], is_over: Callable[[], bool]) -> None:
        """Host work while rows travel; the meter is told what of it was not hidden."""
        begin = time.perf_counter()
        work()
        if is_over():
            self.comm.meter.exposed_seconds += time.perf_counter() - begin

    def answers(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[Tensor]:
        wire = self.transport.codecs("combine")
        own, under_way = self._return(received.copies, partial, wire.plain)
        yield
        (remote,) = arrive(under_way)
        return torch.cat([wire.staying(own), remote])

    def combine(self, tokens: Tokens, received: Received, partial: Tensor) -> Stage[TokenBatch]:
        hidden, copies, n = tokens.hidden, received.copies, received.copies.num_local
        wire = self.transport.codecs("combine")
        # Coded rows are added up by token by what decodes them.
        codecs = wire.adding(copies.token[n:], hidden.shape[0]) if wire.coded else wire.plain
        own, under_way = self._return(copies, partial, codecs)
        base = tokens.base(tokens.start, tokens.normed)  # shared experts work while the answers travel
        yield
        (remote,) = arrive(under_way)
        # Up to K partial sums meet in a token; adding them in bfloat16 would round K times.
        if wire.coded:
            out = base.to(torch.promote_types(hidden.dtype, torch.float32)) + remote
            out = out.index_add(0, copies.token[:n], wire.staying(own).to(out.dtype)).to(hidden.dtype)
        else:
            out = sum_rows(torch.cat([own, remote]), copies.token, copies.place, base)
        return tokens.batch.with_hidden(boundary(out, self.clock, "exchange", "other"))

    def _return(
        self, copies: Copies, partial: Tensor, codecs: tuple[Codec | None, Codec | None]
    ) -> tuple[Tensor, RowsUnderWay]:
        """Send partial sums [R, D] back to whom they answer: (own ones, the others on their way)."""
        partial = boundary(partial, self.clock, "experts", "exchange")
        own, away = partial.split([copies.num_local, partial.shape[0] - copies.num_local])
        under_way = depart(
            [away],
            copies.exchange.reversed(),
            directions=("combine",),
            backward_directions=("combine_backward",),
            codecs=(codecs,),
        )
        return own, under_way
