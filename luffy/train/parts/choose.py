"""Which parts a run has, by its options."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from luffy.seats.seater import LearntSeats
from luffy.seats.topic import TopicSeats
from luffy.train.parts import Part
from luffy.train.parts.balancing import Balancing
from luffy.train.parts.condensing import Condensing
from luffy.train.parts.learning import SeatLearning
from luffy.train.parts.placing import Placing
from luffy.train.parts.topics import TopicKeeping
from luffy.train.parts.tracing import Tracing

if TYPE_CHECKING:
    from luffy.train.trainer import Trainer


def choose_parts(trainer: Trainer) -> list[Any]:
    """In the order in which they run. Gives the trainer's reader the seats that its recipe asks for."""
    o, model, mesh, runtime = trainer.options, trainer.model, trainer.mesh, trainer.runtime
    padded, parts = o.layout == "padded", list[Part]()
    learnt = LearntSeats(mesh.ep_size) if runtime.recipe.seats == "learnt" and mesh.world_size > 1 else None
    if (num_topics := o.num_topics(mesh.ep_size)) > 0:
        topical = TopicSeats(num_topics)
        trainer.reader.use(topical)
        parts.append(
            TopicKeeping(
                topical, trainer.reader, trainer.comm, trainer.loader, trainer.config.vocab_size, trainer.out,
                o.start_weights,
            )
        )  # fmt: skip
    if learnt is not None:
        trainer.reader.use(learnt)
        parts.append(SeatLearning(learnt, trainer.reader, runtime, trainer.comm))
    if runtime.condense is not None:
        parts.append(Condensing(runtime.condense, o.condense_warmup, o.condense_until, o.steps))
    every = o.get_rehome_every()
    if every > 0 or learnt is not None:
        parts.append(
            Placing(
                model, trainer.optimizer, trainer.read_micro_batch, every=every, steps=o.steps,
                trained=o.start_weights is not None, padded=padded, num_micro_batches=o.num_micro_batches,
                sequences_each=o.batch_size // (o.num_micro_batches * mesh.dp_size), seats=learnt,
                reader=trainer.reader,
            )
        )  # fmt: skip
    parts.append(Balancing(model, trainer.comm))
    if o.trace_every:
        about = {"model": o.model, "recipe": o.recipe, "seed": o.seed, "data": o.data, "ep_size": mesh.ep_size}
        parts.append(Tracing(model, mesh, o.trace_every, trainer.out / "trace", padded, about))
    return parts
