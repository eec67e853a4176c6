"""Which parts a run has, by its options."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

from luffy.seats.seater import AsRead, LearntSeats
from luffy.seats.topic import TopicSeats
from luffy.train.parts import Part
from luffy.train.parts.balancing import Balancing
from luffy.train.parts.condensing import Condensing
from luffy.train.parts.learning import SeatLearning
from luffy.train.parts.placing import Placing
from luffy.train.parts.topics import TopicKeeping
from luffy.train.parts.tracing import Tracing
from luffy.train.parts.tuning import Mode, Tuning
from luffy.wire_format import parse_wire

if TYPE_CHECKING:
    from luffy.train.steps import Steps


def choose_parts(trainer: Steps) -> list[Any]:
    """In the order in which they run. Gives the trainer's reader the seats that its recipe asks for."""
    o, model, mesh, runtime = trainer.options, trainer.model, trainer.mesh, trainer.runtime
    padded, parts = o.layout == "padded", list[Part]()
    teaches = trainer.config.router.seat_loss > 0
    learnt = LearntSeats(mesh.ep_size, teaches) if runtime.recipe.seats == "learnt" and mesh.world_size > 1 else None
    if (num_topics := o.num_topics(mesh.ep_size)) > 0:
        topical = TopicSeats(num_topics)
        trainer.reader.use(topical)
        parts.append(
            TopicKeeping(
                topical, trainer.reader, trainer.comm, trainer.loader, trainer.config.vocab_size, trainer.out,
                o.start_weights, trained=o.starts_trained,
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
                trained=o.starts_trained, padded=padded, num_micro_batches=o.num_micro_batches,
                sequences_each=o.batch_size // (o.num_micro_batches * mesh.dp_size), seats=learnt,
                reader=trainer.reader,
            )
        )  # fmt: skip
    if runtime.recipe.auto and mesh.world_size > 1:
        parts.insert(0, _tuning(trainer, learnt))
    parts.append(Balancing(model, trainer.comm))
    if o.trace_every:
        about = {"model": o.model, "recipe": o.recipe, "seed": o.seed, "data": o.data, "ep_size": mesh.ep_size}
        parts.append(Tracing(model, mesh, o.trace_every, trainer.out / "trace", padded, about))
    return parts


def _tuning(trainer: Steps, learnt: LearntSeats | None) -> Tuning:
    o, layout, read = trainer.options, trainer.reader.layout, AsRead()

    def use(mode: Mode) -> None:
        trainer.turns = 2 if mode.overlap else 1
        trainer.reader.use(
            learnt if mode.seated and learnt is not None else read,
            replace(layout, num_micro_batches=o.accumulate * trainer.turns),
        )
        trainer.runtime.use_wire(parse_wire(mode.wire))

    share = trainer.mesh.world_size * o.accumulate * 2
    wires = ["model"] if o.wire is None else list(dict.fromkeys(["model", "int8", o.wire]))
    may_overlap = o.batch_size % share == 0
    return Tuning(use, trainer.comm, may_overlap=may_overlap, wires=wires, every=o.auto_every)
