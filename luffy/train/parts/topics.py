"""A run's topics: fitted before the first step, the same on all ranks, kept beside the model, shown in its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from luffy.comm import Comm
from luffy.report.runs import TOPICS_FILE, writing_to
from luffy.seats.topic import TopicSeats
from luffy.seats.topics import NUM_FITTED, Topics
from luffy.train.measure import LOAD_EVERY
from luffy.train.parts import Done, Stateless
from luffy.train.ranklog import tell
from luffy.train.seating import StepReader


class TopicKeeping(Stateless):
    """Finds the topics of `seats` before the first step: those of the checkpoint; of the model that the run starts
    from; regrouped to this run's number; else fitted to the first sequences of the order."""

    name = "topics"

    def __init__(self, seats: TopicSeats, reader: StepReader, comm: Comm, loader: Any, vocab_size: int, out: Path,
                 start_weights: str | None, trained: bool) -> None:  # fmt: skip
        self.seats, self.reader, self.comm, self.loader = seats, reader, comm, loader
        self.vocab_size, self.out, self.start_weights, self.trained = vocab_size, out, start_weights, trained

    def before(self, step: int) -> None:
        if self.seats.topics is not None:
            return
        self.seats.topics = self._find()
        self.reader.decide_anew()
        if self.comm.mesh.rank == 0:
            with writing_to(self.out / TOPICS_FILE):
                self.out.mkdir(parents=True, exist_ok=True)
                self.seats.topics.save(self.out / TOPICS_FILE)

    def _find(self) -> Topics:
        """Every rank reads the same and counts in integers; the first one's counts are taken by all."""
        kept = self.seats.fewer
        if kept is None and self.start_weights is not None:
            beside = Path(self.start_weights).parent / TOPICS_FILE
            kept = Topics.load(beside) if beside.is_file() else None
        if kept is None and self.trained and self.comm.mesh.rank == 0:
            tell(
                f"--seats topic: no {TOPICS_FILE} lies beside the trained weights: topics are fitted anew, beside "
                "experts that their sequences may never have chosen; --seats learnt keeps what routers have learnt"
            )
        per_batch = self.loader.global_batch_size
        batches = range(min(-(-NUM_FITTED // per_batch), max(1, getattr(self.loader, "num_full_batches", 1))))
        wanted = self.seats.num_topics
        if kept is not None and wanted <= kept.num_topics:
            topics = kept.regrouped(wanted)
        else:
            first = [s.tokens for b in batches for s in self.loader.batch(b)]
            topics = Topics.fit(first, wanted, self.vocab_size) if kept is None else kept.regrouped(wanted, first)
        counts = torch.from_numpy(topics.counts).to(self.comm.mesh.device)
        shared = self.comm.all_reduce(counts if self.comm.mesh.rank == 0 else torch.zeros_like(counts))
        self.comm.meter.take()  # agreeing is not part of a step's traffic
        return Topics(shared.cpu().numpy())

    def after(self, step: int, done: Done) -> None:
        if done.routers is None:
            return
        share = done.routers.seat_traffic / max(done.routers.num_tokens, 1)
        done.record["topics"] = topic_record(share)
        if (step + 1) % LOAD_EVERY == 0:
            done.record["topics_by_layer"] = [topic_record(layer[None]) for layer in share]

    def state(self) -> dict[str, Any]:
        return dict(self.seats.state())

    def load(self, state: dict[str, Any]) -> None:
        self.seats.load(state)


def topic_record(traffic: Tensor) -> dict[str, float]:
    """For the metrics, from the share of tokens by topic and block of experts chosen, [layers, C, C].

    Means over layers, as if each block were a rank. blocks_touched: blocks that a token chose experts of; rows_away:
    those that are not its topic's own; rows_at_home: the share of a token's blocks that is its own. busiest: rows that
    the busiest block sends or receives, over what vanilla_dedup would receive on average at the same choices.
    """
    traffic = traffic.to(torch.float64).cpu()
    touched, home = traffic.sum((1, 2)), traffic.diagonal(dim1=1, dim2=2).sum(1)
    away = traffic - torch.diag_embed(traffic.diagonal(dim1=1, dim2=2))
    C = traffic.shape[1]
    busiest = torch.maximum(away.sum(1), away.sum(2)).max(1).values
    dealt = touched * (C - 1) / C / C
    return {
        "rows_at_home": float((home / touched.clamp_min(1e-9)).mean()),
        "blocks_touched": float(touched.mean()),
        "rows_away": float((touched - home).mean()),
        "busiest": float((busiest / dealt.clamp_min(1e-9)).mean()),
    }
