"""A run's topics: fitted before the first step, the same on all ranks, kept beside the model, counted in its metrics."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from luffy.data import SequenceLoader
from luffy.seats.topics import NUM_FITTED, Topics
from luffy.train.options import TrainOptions

TOPICS_FILE = "topics.npz"  # in a run's folder, beside model.safetensors


class TopicControl:
    """Gives each sequence of a step its topic."""

    def __init__(self, options: TrainOptions, ep_size: int) -> None:
        self.options, self.num_topics = options, options.num_topics(ep_size)
        self.topics: Topics | None = None

    def prepare(self, loader: SequenceLoader, vocab_size: int, out: Path, rank: int, resumed: bool) -> None:
        """Topics of the run that is resumed, or of the model that it starts from, regrouped to this run's number; else
        fitted to the first sequences of the order. The first rank decides for all. Every rank calls it."""
        found: list[Any] = [None]
        if rank == 0:
            found[0] = self._find(loader, vocab_size, out, resumed).counts
        if dist.is_initialized() and dist.get_world_size() > 1:
            dist.broadcast_object_list(found, src=0)
        self.topics = Topics(found[0])
        if rank == 0:
            out.mkdir(parents=True, exist_ok=True)
            self.topics.save(out / TOPICS_FILE)

    def _find(self, loader: SequenceLoader, vocab_size: int, out: Path, resumed: bool) -> Topics:
        start = self.options.start_weights
        kept = out / TOPICS_FILE if resumed or start is None else Path(start).parent / TOPICS_FILE
        batches = range(min(-(-NUM_FITTED // loader.global_batch_size), max(1, loader.num_full_batches)))
        if (resumed or start is not None) and kept.is_file():
            topics = Topics.load(kept)
            more = self.num_topics > topics.num_topics
            return topics.regrouped(self.num_topics, [s.tokens for b in batches for s in loader.batch(b)] if more else ())
        return Topics.fit([s.tokens for b in batches for s in loader.batch(b)], self.num_topics, vocab_size)

    def of_step(self, loader: SequenceLoader, step: int, world_size: int) -> list[dict[str, Any]]:
        """For each micro-batch of a step, what `make_micro_batch` is told: topics [world, sequences], evenly shared in
        the whole step."""
        assert self.topics is not None
        A = self.options.num_micro_batches
        everyone = [s.tokens for m in range(A) for s in loader.batch(step * A + m)]
        topics = self.topics.assign(everyone).reshape(A, world_size, -1)
        strength = self.options.seat_strength(step)
        return [{"topics": t, "num_topics": self.num_topics, "seat_strength": strength} for t in topics]


def topic_record(traffic: Tensor) -> dict[str, float]:
    """For the metrics, from the share of tokens by topic and block of experts chosen, [layers, C, C]: means over layers.

    blocks_touched: blocks that a token chose experts of; rows_away: those that are not its topic's own; rows_at_home:
    the share of a token's blocks that is its own. busiest: the rows that the busiest block sends or receives, over
    what vanilla_dedup would receive on average at the same choices. All as if each block were a rank.
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
